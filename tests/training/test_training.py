"""DPO over the tables: step 0, gradients, identity of a policy, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from support import build_tiny_model, prepared, stepped
from transformers import AutoModelForCausalLM

from pipeline.errors import TrainingError
from pipeline.models import Checkpoint, load_model
from pipeline.names import key_of
from pipeline.plan import Plan, TrainingConfig, load_plan
from pipeline.scoring.engines.base import Completion
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import compute_rewards, score, train
from pipeline.store import Store, read
from pipeline.training.data.examples import Example, training_pairs, values_digest
from pipeline.training.data.schedule import step_ids
from pipeline.training.run.model import trainable_model

WritePlan = Any


def test_training_starts_at_ties_and_learns(write_plan: WritePlan) -> None:
    plan, store = prepared(write_plan(), "training.epochs=8", "training.learning_rate=1e-2")
    result = train(plan, store, "dpo")
    assert result.trained
    assert result.first_step.difference == 0.0
    first = result.steps.row(0, named=True)
    assert first["rewards/accuracies"] == 0.5
    assert first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(np.log(2))
    assert result.steps["loss"][-1] < 0.5 * first["loss"]
    assert result.steps["rewards/accuracies"][-1] == 1.0
    assert read(store, "training_steps/dpo").equals(result.steps)


def test_the_policys_own_scores_agree_with_the_training_log(write_plan: WritePlan) -> None:
    """One step with one batch: what the ledger holds afterwards is what the second step saw."""
    plan, store = prepared(
        write_plan(), "training.batch_pairs=64", "training.max_steps=1", "training.warmup_share=0"
    )
    train(plan, store, "dpo")
    score(plan, store, "dpo")
    compute_rewards(plan, store, "dpo")
    rewards = read(store, "rewards/dpo").filter(pl.col("split") == "train")
    two = load_plan(Path(write_plan()), [
        "training.batch_pairs=64", "training.max_steps=2", "training.epochs=2",
        "training.warmup_share=0", "training.schedule=constant_with_warmup",
    ])  # fmt: skip
    second = train(two, store, "dpo").steps.row(1, named=True)
    assert second["rewards/margins"] != 0
    assert second["rewards/margins"] == pytest.approx(rewards["margin"].mean(), abs=1e-5)
    assert second["logps/chosen"] == pytest.approx(rewards["policy_chosen"].mean(), abs=1e-4)


def test_gradients_equal_autograd_in_float64(write_plan: WritePlan) -> None:
    """Per adapter tensor, against the loss written out over a plain float64 model."""
    plan, store = prepared(write_plan())
    pairs = pairs_of(plan, store)[:3]
    # A reference that is not the start, so that the weights of the pairs differ.
    pairs = [
        replace(p, references=(p.references[0] - 3.0 * i, p.references[1]))
        for i, p in enumerate(pairs)
    ]
    objective, config = plan.objectives["dpo"], plan.models["base"]
    start = Checkpoint(Path(config.checkpoint))
    models = {}
    for dtype in ("float32", "float64"):
        numerics = config.model_copy(update={"dtype": dtype})
        models[dtype] = trainable_model(start, numerics, plan.training, torch.device("cpu"))
    single, double = models["float32"], models["float64"]
    twins = dict(double.named_parameters())
    for name, parameter in single.named_parameters():
        if "lora_B" in name:  # at its start B is 0, and A's gradient with it
            parameter.data = torch.randn_like(parameter) * 0.05
        twins[name].data = parameter.data.double()
    stepped(single, pairs, objective)
    losses = [written_out(double, pair, objective.values["beta"]) for pair in pairs]
    torch.autograd.backward(torch.stack(losses).mean())
    mine, oracle = (
        {n: p.grad.double() for n, p in m.named_parameters() if p.grad is not None}
        for m in (single, double)
    )
    assert len(mine) == 2 * 2 * 7  # A and B, two layers, seven linear maps each
    for name, gradient in oracle.items():
        assert gradient.norm() > 0
        error = (mine[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error}"


def test_adapters_can_stay_in_the_last_layers(write_plan: WritePlan) -> None:
    changes = ["training.learning_rate=1e-2", "training.lora.last_layers=1"]
    plan, store = prepared(write_plan(), *changes)
    result = train(plan, store, "dpo")
    adapter = load_file(result.directory / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7
    assert all(".layers.1." in name for name in adapter)
    assert result.first_step.difference == 0.0
    assert result.steps["loss"][-1] < result.steps["loss"][0]
    # What the ledger says of the policy is what PEFT makes of the adapter alone.
    score(plan, store, "dpo")
    compute_rewards(plan, store, "dpo")
    assert read(store, "rewards/dpo")["logratio_chosen"].abs().max() > 1e-3  # type: ignore[operator]
    everywhere, _ = prepared(write_plan(), "training.learning_rate=1e-2")
    other = train(everywhere, store, "dpo")
    assert other.policy_id != result.policy_id
    assert len(load_file(other.directory / "adapter_model.safetensors")) == 2 * 2 * 7


def written_out(model: torch.nn.Module, pair: Example, beta: float) -> torch.Tensor:
    totals = []
    for completion in pair.replies:
        ids = torch.tensor([[*pair.prompt_ids, *completion.ids]])
        logits = model(input_ids=ids).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        totals.append(logprobs[len(pair.prompt_ids) - 1 :].sum())
    h = (totals[0] - pair.references[0]) - (totals[1] - pair.references[1])
    return torch.log1p(torch.exp(-beta * h))


def pairs_of(plan: Plan, store: Store) -> list[Example]:
    reference, _ = key_of(plan, store, "base")
    return training_pairs(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read(store, "sequences"),
        read_logprobs(reference),
    )


def test_only_the_train_split_is_trained_on(write_plan: WritePlan) -> None:
    plan, store = prepared(write_plan())
    splits = dict(read(store, "pairs").select("pair_id", "split").iter_rows())
    trained_on = {pair.example_id for pair in pairs_of(plan, store)}
    assert trained_on == {i for i, split in splits.items() if split == "train"}
    assert 0 < len(trained_on) < len(splits)


def test_the_same_policy_is_trained_once(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = prepared(write_plan())
    first = train(plan, store, "dpo")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pipeline.training.run.model.load_model", fail)
    again = train(plan, store, "dpo")
    assert (again.policy_id, again.trained) == (first.policy_id, False)
    assert again.steps.equals(first.steps)
    assert again.first_step == first.first_step
    monkeypatch.undo()
    other = train(load_plan(write_plan(), ["training.seed=1"]), store, "dpo")
    assert other.trained
    assert other.policy_id != first.policy_id


@pytest.mark.parametrize(
    "override",
    [
        "objectives.dpo.beta=0.2",
        "training.learning_rate=2e-3",
        "training.batch_pairs=3",
        "training.lora.rank=4",
        "split.test_share=0.5",
    ],
)
def test_what_decides_the_weights_decides_the_id(write_plan: WritePlan, override: str) -> None:
    path = write_plan()
    ids = []
    for overrides in ((), (override,)):
        plan, store = prepared(path, "training.max_steps=1", *overrides)
        ids.append(train(plan, store, "dpo").policy_id)
    assert ids[0] != ids[1]


def test_what_does_not_decide_the_weights_does_not(write_plan: WritePlan) -> None:
    ids = []
    for override in ("report.beta=0.1", "report.beta=0.7", "scoring.commit_rows=1"):
        plan, store = prepared(write_plan(), "training.max_steps=1", override)
        ids.append(train(plan, store, "dpo").policy_id)
    assert len(set(ids)) == 1


def test_training_is_repeatable_to_the_bit(write_plan: WritePlan, tmp_path: Path) -> None:
    weights = []
    for where in ("one", "two"):
        plan, store = prepared(write_plan(store=str(tmp_path / where)))
        directory = train(plan, store, "dpo").directory
        weights.append(load_file(directory / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_the_policy_is_in_hugging_face_form(write_plan: WritePlan) -> None:
    from peft import AutoPeftModelForCausalLM

    plan, store = prepared(write_plan(), "training.learning_rate=1e-2")
    result = train(plan, store, "dpo")
    assert {f.suffix for f in result.directory.iterdir()}.isdisjoint({".bin", ".pt", ".pkl"})
    record = json.loads((result.directory / "policy.json").read_text())
    assert record["policy_id"] == result.policy_id
    score(plan, store, "dpo")
    key, _ = key_of(plan, store, "dpo")
    scored = dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows())
    model = AutoPeftModelForCausalLM.from_pretrained(result.directory).double()
    base = AutoModelForCausalLM.from_pretrained(plan.models["base"].checkpoint).double()
    row = read(store, "sequences").row(0, named=True)
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    sums = []
    for candidate in (model, base):
        with torch.inference_mode():
            logprobs = torch.log_softmax(candidate(input_ids=ids).logits[0, :-1], -1)
        picked = logprobs.gather(1, ids[0, 1:, None])[row["n_prompt"] - 1 :, 0]
        sums.append(float(picked.sum()))
    assert scored[row["sequence_id"]] == pytest.approx(sums[0], abs=1e-3)
    assert abs(scored[row["sequence_id"]] - sums[1]) > 1e-2, "control: the untrained base"


def test_other_numerics_are_refused(write_plan: WritePlan, tiny_model: Path) -> None:
    models = {
        "base": {"checkpoint": str(tiny_model)},
        "half": {"checkpoint": str(tiny_model), "dtype": "bfloat16"},
    }
    objectives = {"dpo": {"loss": "dpo", "beta": 0.1, "reference": "half", "start": "base"}}
    never = "training.reference_correction=never"
    plan, store = prepared(write_plan(models=models, objectives=objectives), never)
    with pytest.raises(TrainingError, match="other numerics"):
        train(plan, store, "dpo")


def test_a_start_that_is_not_what_the_tables_say_stops_at_step_1(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, store = prepared(write_plan())
    other = Checkpoint(build_tiny_model(tmp_path / "other", seed=5))
    monkeypatch.setattr(
        "pipeline.training.run.model.load_model",
        lambda _, **numerics: load_model(other, **numerics),
    )
    with pytest.raises(TrainingError, match=r"step 1: .* differ from the start model's"):
        train(plan, store, "dpo")
    assert not list(store.policies.glob("[!.]*")), "nothing half-trained is left"


def test_a_reference_that_is_not_the_start_does_not_start_at_ties(
    write_plan: WritePlan, tiny_model: Path, tmp_path: Path
) -> None:
    other = build_tiny_model(tmp_path / "other", seed=5)
    models = {"base": {"checkpoint": str(tiny_model)}, "other": {"checkpoint": str(other)}}
    objectives = {"dpo": {"loss": "dpo", "beta": 0.1, "reference": "other", "start": "base"}}
    plan, store = prepared(write_plan(models=models, objectives=objectives))
    result = train(plan, store, "dpo")
    assert result.first_step.difference == 0.0
    assert result.steps["rewards/margins"][0] != 0.0


def test_an_infinite_loss_names_the_step(write_plan: WritePlan) -> None:
    plan, store = prepared(write_plan(), "training.learning_rate=1e30", "training.epochs=4")
    with pytest.raises(TrainingError, match=r"step [2-9]\d*: \S+ is (nan|inf)"):
        train(plan, store, "dpo")


def fake_pairs(n: int) -> list[Example]:
    completion = Completion("s", np.array([1], np.int32), ((0, 1),))
    prompt = np.array([1], np.int32)
    return [Example(f"{i:032x}", prompt, (completion, completion), (0.0, 0.0)) for i in range(n)]


def test_a_schedule_visits_every_pair_once_an_epoch() -> None:
    ids = {f"{i:032x}": 10 for i in range(10)}
    steps = step_ids(ids, TrainingConfig(batch_pairs=4, epochs=2))
    assert [len(batch) for batch in steps] == [4, 4, 2, 4, 4, 2]
    epochs = [[i for batch in half for i in batch] for half in (steps[:3], steps[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(ids)
    assert epochs[0] != epochs[1], "another order every epoch"
    turned = dict(reversed(ids.items()))
    assert step_ids(turned, TrainingConfig(batch_pairs=4, epochs=2)) == steps
    assert len(step_ids(ids, TrainingConfig(batch_pairs=4, epochs=2, max_steps=2))) == 2
    assert len(step_ids(ids, TrainingConfig(batch_pairs=4, epochs=0.5))) == 2
    assert len(step_ids(ids, TrainingConfig(batch_pairs=4, epochs=0.01))) == 1


def test_a_step_can_be_counted_in_tokens() -> None:
    ids = {f"{i:032x}": 10 * (i + 1) for i in range(10)}
    steps = step_ids(ids, TrainingConfig(batch_tokens=120))
    assert sorted(i for batch in steps for i in batch) == sorted(ids)
    sizes = [sum(ids[i] for i in batch) for batch in steps]
    assert all(size <= 120 for size in sizes)
    following = [ids[batch[0]] for batch in steps[1:]]
    assert all(size + more > 120 for size, more in zip(sizes, following, strict=False)), "full"
    alone = step_ids(ids, TrainingConfig(batch_tokens=5))
    assert all(len(batch) == 1 for batch in alone), "one that is larger is a step of its own"


def test_the_values_digest_tells_values_and_order() -> None:
    pairs = fake_pairs(3)
    assert values_digest(pairs) != values_digest(pairs[::-1])
    changed = [replace(pairs[0], references=(1e-12, 0.0)), *pairs[1:]]
    assert values_digest(pairs) != values_digest(changed)
    assert values_digest(pairs) != values_digest([replace(pairs[0], weight=2.0), *pairs[1:]])
