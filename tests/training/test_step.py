"""The step's gradient by tensor: all weights, several copies, checkpointed, under autocast."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build_tiny_model, measured, prepared, stepped
from transformers import AutoModelForCausalLM

from pipeline.models import Checkpoint
from pipeline.names import key_of
from pipeline.plan import ObjectiveConfig, Plan, TrainingConfig, load_plan
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import train
from pipeline.store import Store, read
from pipeline.training.data.examples import Example, training_pairs
from pipeline.training.data.schedule import step_ids
from pipeline.training.run.model import trainable_model
from pipeline.training.run.replicas import Replicas, divide
from pipeline.training.run.step import Work, run_step

WritePlan = Any
Gradients = dict[str, torch.Tensor]
CPU = torch.device("cpu")


@pytest.fixture
def work(write_plan: WritePlan, tmp_path: Path) -> tuple[Plan, Store, list[Example]]:
    """Tied weights, and a padding token among the replies: as an input it has no gradient."""
    model = build_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    plan, store = prepared(write_plan(models={"base": {"checkpoint": str(model)}}))
    reference, _ = key_of(plan, store, "base")
    pairs = training_pairs(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read(store, "sequences"),
        read_logprobs(reference),
    )
    pairs = [
        replace(p, references=(p.references[0] - i, p.references[1])) for i, p in enumerate(pairs)
    ]
    return plan, store, pairs[:5]


def gradients(plan: Plan, examples: list[Example], **how: Any) -> Gradients:
    config = TrainingConfig(method="full", gradient_checkpointing=how.pop("checkpointing", False))
    start = Checkpoint(Path(plan.models["base"].checkpoint))
    model = trainable_model(start, plan.models["base"], config, CPU)
    stepped(model, examples, plan.objectives["dpo"], **how)
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def oracle(plan: Plan, examples: list[Example]) -> Gradients:
    """Plain transformers in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(plan.models["base"].checkpoint).double()
    losses = []
    for example in examples:
        ratios = []
        for reply, reference in zip(example.replies, example.references, strict=True):
            ids = torch.tensor([[*example.prompt_ids, *reply.ids]])
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
            picked = logprobs.gather(1, ids[0, 1:, None])[len(example.prompt_ids) - 1 :, 0]
            ratios.append(picked.sum() - reference)
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])))
    torch.autograd.backward(torch.stack(losses).mean())
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def worst(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


def test_every_weight_has_float64s_gradient(work: tuple[Plan, Store, list[Example]]) -> None:
    plan, _, examples = work
    expected = oracle(plan, examples)
    found = gradients(plan, examples)
    embedding = expected["model.embed_tokens.weight"]
    padding = AutoModelForCausalLM.from_pretrained(
        plan.models["base"].checkpoint
    ).config.pad_token_id
    assert any(padding in reply.ids for e in examples for reply in e.replies)
    assert embedding[padding].norm() > 0, "as an output it has one"
    fewer = gradients(plan, examples[:-1])
    far, control = worst(found, expected), worst(fewer, expected)
    measured(f"per tensor {far:.1e}; control, a pair less: {control:.2f}")
    assert worst(found, expected) < 1e-4
    assert worst(fewer, expected) > 0.05


@pytest.mark.parametrize(
    "how",
    [
        {"threads": 2, "most_tokens": 64},
        {"threads": 3, "most_tokens": 1},
        {"most_tokens": 1},
        {"checkpointing": True},
        {"checkpointing": True, "threads": 2, "most_tokens": 64},
    ],
)
def test_however_it_is_cut_the_gradient_is_the_same(
    work: tuple[Plan, Store, list[Example]], how: dict[str, Any]
) -> None:
    plan, _, examples = work
    assert worst(gradients(plan, examples, **how), gradients(plan, examples)) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_begins_anew_where_the_last_one_left_the_largest_gradient(
    work: tuple[Plan, Store, list[Example]], threads: int
) -> None:
    plan, _, examples = work
    config = TrainingConfig(method="full")
    start = Checkpoint(Path(plan.models["base"].checkpoint))
    model = trainable_model(start, plan.models["base"], config, CPU)
    one = Work(examples, 1, range(len(examples)), {})
    seen: list[Gradients] = []
    places = set()
    with Replicas(model, threads) as replicas:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            run_step(replicas, one, plan.objectives["dpo"], 64, lambda *_: None)
            gradient = model.get_output_embeddings().weight.grad
            assert isinstance(gradient, torch.Tensor)
            places.add(gradient.data_ptr())
            seen.append(
                {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
            )
    assert len(places) == 1
    assert worst(seen[1], seen[0]) == 0


def test_checkpointed_layers_are_computed_twice(work: tuple[Plan, Store, list[Example]]) -> None:
    plan, _, examples = work
    config = TrainingConfig(gradient_checkpointing=True)
    start = Checkpoint(Path(plan.models["base"].checkpoint))
    calls = []
    for one in (config, TrainingConfig()):
        model = trainable_model(start, plan.models["base"], one, CPU)
        seen: list[int] = []
        # Before, since what is computed anew ends where no more is needed.
        model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, s=seen: s.append(1)
        )
        with Replicas(model, 1) as replicas:
            seen.clear()
            assert replicas.packs_examples
            stepped(model, examples, plan.objectives["dpo"])
        calls.append(len(seen))
        assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert calls[0] == calls[1] + 1


@pytest.mark.parametrize("loss", ["dpo", "aot"])
@pytest.mark.parametrize(
    ("half", "threads", "checkpointing"),
    [
        (torch.bfloat16, 1, False),
        (torch.bfloat16, 2, False),
        (torch.bfloat16, 1, True),
        (torch.float16, 1, False),
    ],
)
def test_in_half_precision_gradients_are_float32s_and_near(
    work: tuple[Plan, Store, list[Example]],
    loss: str,
    half: torch.dtype,
    threads: int,
    checkpointing: bool,
) -> None:
    """As on a GPU; of a loss that asks the model first, too, and in float16 with a loss scale."""
    plan, _, examples = work
    objective = ObjectiveConfig.model_validate(
        {"loss": loss, "beta": 0.1, "reference": "base", "start": "base"}
    )
    config = TrainingConfig(method="full", gradient_checkpointing=checkpointing)
    start = Checkpoint(Path(plan.models["base"].checkpoint))
    scaler = torch.amp.GradScaler("cpu", 1024.0, enabled=half == torch.float16)
    on_the_way_back: set[bool] = set()
    found: list[Gradients] = []
    for autocast in (nullcontext, partial(torch.autocast, "cpu", half)):
        model = trainable_model(start, plan.models["base"], config, CPU)
        for parameter in model.parameters():
            parameter.register_hook(lambda _: on_the_way_back.add(torch.is_autocast_enabled("cpu")))
        step = Work(examples, 1, range(len(examples)), {})
        how: dict[str, Any] = {"autocast": autocast}
        if autocast is not nullcontext:
            how["scale"] = scaler.scale
        with Replicas(model, threads) as replicas:
            run_step(replicas, step, objective, 64, lambda *_: None, **how)
        scale = 1.0 if autocast is nullcontext else scaler.get_scale()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        found.append({n: g.double() / scale for n, g in gradients.items()})
    far = worst(found[1], found[0])
    measured(f"{loss} under {half}, {threads} threads: gradients within {far:.3f} of float32's")
    assert on_the_way_back == {False}
    assert (1e-4 if half == torch.bfloat16 else 1e-5) < far < 0.2


def test_parts_are_of_about_the_same_size_and_lose_nobody() -> None:
    costs = [500, 30, 200, 210, 60, 90, 400, 10]
    parts = divide(costs, 256, 2)
    assert sorted(i for part in parts for i in part) == list(range(8))
    loads = [sum(costs[i] for i in part) for part in parts]
    assert len(parts) == 6
    assert max(loads) == 500, "the longest is alone"
    assert divide(costs, 10**9, 2) != divide(costs, 10**9, 3)
    assert [len(part) for part in divide([5], 1, 4)] == [1]
    assert divide(costs, 256, 2) == parts, "always the same"


def test_entropy_and_token_accuracy_are_trls(write_plan: WritePlan, tmp_path: Path) -> None:
    """Of the first step, whose model is the start in both; over the whole vocabulary by hand."""
    plan, store = prepared(
        write_plan(training={"batch_pairs": 4, "max_steps": 2, "token_statistics": True})
    )

    result = train(plan, store, "dpo")
    first = result.steps.row(0, named=True)
    reference, _ = key_of(plan, store, "base")
    pairs = training_pairs(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read(store, "sequences"),
        read_logprobs(reference),
    )
    by_id = {pair.example_id: pair for pair in pairs}
    (batch, *_) = step_ids({i: e.n_tokens for i, e in by_id.items()}, plan.training)
    model = AutoModelForCausalLM.from_pretrained(plan.models["base"].checkpoint).double()
    entropies, hits = [], []
    for example in (by_id[i] for i in batch):
        for reply in example.replies:
            ids = torch.tensor([[*example.prompt_ids, *reply.ids]])
            logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1].detach()
            logprobs = torch.log_softmax(logits, -1)
            entropies += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
            if reply is example.replies[0]:
                hits += (logits.argmax(-1) == torch.from_numpy(reply.ids.astype("int64"))).tolist()
    assert first["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert first["mean_token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    off = train(
        load_plan(Path(write_plan(training={"batch_pairs": 4, "max_steps": 2}))), store, "dpo"
    )
    assert off.policy_id == result.policy_id, "they decide no weight"
