"""Labels beside pairs and alone: what is read, gradients, identity, refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import prepared, stepped, tokenized

from pipeline.errors import PlanError, ScoringError, TrainingError
from pipeline.intake import run_intake
from pipeline.models import Checkpoint
from pipeline.names import key_of, wanted_sequences
from pipeline.plan import Plan, load_plan
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import (
    compute_landscape,
    compute_rewards,
    score,
    tokenize,
    train,
    write_report,
)
from pipeline.store import Store, read
from pipeline.training.data.examples import Example, Mismatched, training_examples, values_digest
from pipeline.training.data.preferences import read_preferences
from pipeline.training.policy import policy_id
from pipeline.training.run.model import trainable_model

WritePlan = Any
WriteLabels = Callable[..., dict[str, str]]
OF = {"reference": "base", "start": "base"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "kto": {"loss": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.7, **OF},
    "bco": {"loss": "bco_unpaired", "undesirable_weight": 0.7, **OF},
}


def both(write_plan: WritePlan, write_labels: WriteLabels, **sections: Any) -> Path:
    """A plan of 12 pairs and 20 labels."""
    pairs = {"path": str(Path(write_plan()).parent / "p.jsonl"), "shape": "conversational"}
    sources = {"pairs": pairs, "labels": write_labels()}
    return Path(write_plan(**{"sources": sources, "objectives": OBJECTIVES, **sections}))


def alone(write_plan: WritePlan, write_labels: WriteLabels, **sections: Any) -> Path:
    """A plan of 20 labels."""
    sources = {"labels": write_labels()}
    return Path(write_plan(**{"sources": sources, "objectives": OBJECTIVES, **sections}))


def examples_of(plan: Plan, store: Store, name: str, split: str = "train") -> list[Example]:
    objective, (reference, _) = plan.objectives[name], key_of(plan, store, "base")
    return training_examples(
        objective,
        read_preferences(store),
        wanted_sequences(plan, store, "base"),
        read_logprobs(reference),
        read(store, f"kl_sequences/{name}") if objective.spec.needs_kl else None,
        split=split,
    )


def test_an_example_is_a_pair_or_a_label(write_plan: WritePlan, write_labels: WriteLabels) -> None:
    plan, store = prepared(both(write_plan, write_labels))
    examples = examples_of(plan, store, "kto")
    labels = read(store, "labels").filter(split="train")
    pairs = read(store, "pairs").filter(split="train")
    assert 0 < labels.height < 20
    ids = [example.example_id for example in examples]
    assert ids == [*sorted(pairs["pair_id"]), *sorted(labels["label_id"])]
    ways = dict(read(store, "label_sequences").select("label_id", "sequence_id").iter_rows())
    sequences = {row["sequence_id"]: row for row in read(store, "sequences").to_dicts()}
    reference = dict(
        read_logprobs(key_of(plan, store, "base")[0]).select("sequence_id", "logprob").iter_rows()
    )
    desirable = dict(labels.select("label_id", "desirable").iter_rows())
    for example in examples[pairs.height :]:
        sequence = sequences[ways[example.example_id]]
        (reply,) = example.replies
        assert example.desirable is desirable[example.example_id]
        assert example.sides == (("chosen",) if example.desirable else ("rejected",))
        assert example.prompt_ids.tolist() == sequence["prompt_ids"]
        assert reply.ids.tolist() == sequence["completion_ids"]
        assert example.references == (reference[sequence["sequence_id"]],)
        assert len(example.mismatched_in(1)) == 1
    assert {example.desirable for example in examples} == {True, False, None}
    held_out = examples_of(plan, store, "kto", "test")
    assert set(ids).isdisjoint(example.example_id for example in held_out)
    assert {len(example.replies) for example in held_out} == {1, 2}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_pairs_and_labels_is_that_of_the_mean_over_rows(
    write_plan: WritePlan, write_labels: WriteLabels, name: str
) -> None:
    """Per adapter tensor, against autograd of the loss written out over all rows, in float64."""
    plan, store = prepared(both(write_plan, write_labels))
    found = examples_of(plan, store, name)
    pairs = [example for example in found if example.desirable is None]
    liked = [example for example in found if example.desirable is True]
    disliked = [example for example in found if example.desirable is False]
    # References away from the start, so that every row has a weight of its own.
    examples = [
        moved(example, 2.0 * (i % 3) - 1.5)
        for i, example in enumerate([*pairs[:2], *liked[:3], *disliked[:2], *pairs[2:3]])
    ]
    objective = plan.objectives[name]
    written = kto_rows if name == "kto" else bco_rows
    gradients = {}
    for whose in ("mine", "oracle", "without weights", "pairs as one row"):
        model = float64_model(plan)
        if whose == "mine":
            seen = stepped(model, examples, objective, most_tokens=40)
        else:
            weights = (1.0, 1.0) if whose == "without weights" else (1.3, 0.7)
            rows = written(model, examples, weights if name == "kto" else (1.0, weights[1]))
            n_rows = [len(example.replies) for example in examples for _ in example.replies]
            alike = whose != "pairs as one row"
            shares = torch.tensor([1.0 if alike else 1.0 / n for n in n_rows]).double()
            loss = (shares * torch.stack(rows)).sum() / shares.sum()
            torch.autograd.backward(loss)
            if whose == "oracle":
                total = sum(
                    len(e.replies) * (numbers["loss"] or 0.0)
                    for e, numbers in zip(examples, seen.seen, strict=True)
                )
                assert total / len(n_rows) == pytest.approx(loss.item(), rel=1e-6)
        gradients[whose] = {
            key: p.grad for key, p in model.named_parameters() if p.grad is not None
        }
    if name == "kto":
        assert seen.statistics["kl"] > 1, "the reference point is in it"

    def error(whose: str, key: str) -> float:
        one, other = gradients[whose][key], gradients["oracle"][key]
        return float((one - other).norm() / other.norm())

    assert len(gradients["oracle"]) == len(gradients["mine"]) == 28
    for key in gradients["oracle"]:
        assert gradients["oracle"][key].norm() > 0
        assert error("mine", key) < 1e-5, key
    for control in ("without weights", "pairs as one row"):
        assert max(error(control, key) for key in gradients["oracle"]) > 1e-2, control


def moved(example: Example, by: float) -> Example:
    return replace(
        example,
        references=tuple(q - by * (i + 1) for i, q in enumerate(example.references)),
        mismatched={
            step: tuple(Mismatched(r.completion, r.reference - 6.0) for r in replies)
            for step, replies in example.mismatched.items()
        },
    )


def float64_model(plan: Plan) -> Any:
    config = plan.models["base"].model_copy(update={"dtype": "float64"})
    start = Checkpoint(Path(plan.models["base"].checkpoint))
    model = trainable_model(start, config, plan.training, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.05 * noise.to(parameter.dtype)
    return model


def logprob(model: Any, prompt: Any, ids: Any) -> torch.Tensor:
    tokens = torch.tensor([[*prompt, *ids]])
    logprobs = torch.log_softmax(model(input_ids=tokens).logits[0, :-1], -1)
    picked: torch.Tensor = logprobs.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :, 0].sum()
    return picked


def rows_of(model: Any, examples: list[Example]) -> list[tuple[bool, torch.Tensor]]:
    """Whether it is desirable, and the log-ratio, of every row."""
    return [
        (side == "chosen", logprob(model, example.prompt_ids, reply.ids) - q)
        for example in examples
        for side, reply, q in zip(example.sides, example.replies, example.references, strict=True)
    ]


def kto_rows(
    model: Any, examples: list[Example], weights: tuple[float, float]
) -> list[torch.Tensor]:
    """Ethayarajh et al. 2024, eq. 8, beta 0.1."""
    with torch.no_grad():
        kl = [
            float(logprob(model, example.prompt_ids, reply.completion.ids)) - reply.reference
            for example in examples
            for reply in example.mismatched_in(1)
        ]
    z0 = max(0.0, sum(kl) / len(kl))
    return [
        weights[0] * (1 - torch.sigmoid(0.1 * (h - z0)))
        if one
        else weights[1] * (1 - torch.sigmoid(0.1 * (z0 - h)))
        for one, h in rows_of(model, examples)
    ]


def bco_rows(
    model: Any, examples: list[Example], weights: tuple[float, float]
) -> list[torch.Tensor]:
    """Jung et al. 2024, section 4: delta is the mean of the classes' mean rewards, beta 0.1."""
    rows = rows_of(model, examples)
    means = []
    for of in (True, False):
        rewards = [0.1 * h.item() for one, h in rows if one is of]
        means.append(sum(rewards) / len(rewards))
    delta = sum(means) / 2
    return [
        torch.log1p(torch.exp(delta - 0.1 * h))
        if one
        else weights[1] * torch.log1p(torch.exp(0.1 * h - delta))
        for one, h in rows
    ]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_labels_alone_are_trained_on_evaluated_and_reported(
    write_plan: WritePlan, write_labels: WriteLabels, name: str
) -> None:
    changes = ["training.epochs=6", "training.batch_pairs=16", "training.learning_rate=1e-2"]
    changes += ["training.evaluate_every=2", "training.keep_best=true"]
    plan, store = prepared(alone(write_plan, write_labels), *changes)
    result = train(plan, store, name)
    first, last = result.steps.row(0, named=True), result.steps.row(-1, named=True)
    assert (result.first_step.difference, result.first_step.accuracy) == (0.0, None)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["rewards/margins"] is first["rewards/accuracies"] is None
    assert last["loss"] < first["loss"]
    assert last["rewards/chosen"] > last["rewards/rejected"]
    n_test = read(store, "labels").filter(split="test").height
    assert n_test
    assert set(result.evaluations["n"]) == {n_test}
    assert result.evaluations["eval_rewards/accuracies"].null_count() == result.evaluations.height
    # The policy scores its labels, and their log-ratios are a join; the pairs' tables are empty.
    assert score(plan, store, name).n_wanted == read(store, "label_sequences").height
    assert compute_rewards(plan, store, name).n_rows == 0
    numbers = write_report(plan, store, name).rendered.numbers
    assert numbers["splits"]["all"]["n"] == 0
    assert numbers["training"]["n_nonfinite"] == 0
    assert numbers["training"]["starts_at_reference"] == "exactly"
    one = load_plan(alone(write_plan, write_labels, objectives={name: OBJECTIVES[name]}))
    assert compute_landscape(one, store).table.n_rows == 0


def test_pairs_and_labels_are_evaluated_together(
    write_plan: WritePlan, write_labels: WriteLabels
) -> None:
    path = both(write_plan, write_labels, objectives={"kto": OBJECTIVES["kto"]})
    plan, store = prepared(path, "training.evaluate_every=2")
    n = [read(store, table).filter(split="test").height for table in ("pairs", "labels")]
    found = train(plan, store, "kto").evaluations
    assert set(found["n"]) == {sum(n)}
    assert found["eval_rewards/accuracies"].null_count() == 0
    few = load_plan(path, ["training.evaluate_every=2", "training.evaluation_pairs=3"])
    store_of_few = prepared(path, "training.evaluate_every=2", "training.evaluation_pairs=3")[1]
    (kept,) = store.policies.glob("[!.]*")
    assert train(few, store_of_few, "kto").directory == kept, "what is evaluated decides nothing"


def test_training_starts_at_the_ledger_where_a_label_repeats_a_pairs_reply(
    write_plan: WritePlan, write_pairs: Any, write_labels: WriteLabels
) -> None:
    def turn(role: str, said: str) -> list[dict[str, str]]:
        return [{"role": role, "content": said}]

    replies = {"chosen": "the answer is {}", "rejected": "that depends on {}"}
    said = [
        {
            "prompt": turn("user", f"what of {i}?"),
            **{side: turn("assistant", text.format(i)) for side, text in replies.items()},
        }
        for i in range(6)
    ]
    labels = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in said[:3]
    ]
    sources = {
        "pairs": {"path": str(write_pairs(rows=said, name="q.jsonl")), "shape": "conversational"},
        "labels": write_labels(rows=labels),
    }
    path = write_plan(sources=sources, split={"test_share": 0.0}, objectives=OBJECTIVES)
    plan, store = prepared(path, "training.batch_pairs=64")
    wanted = wanted_sequences(plan, store, "base")
    own = wanted.join(read(store, "sequences"), on="sequence_id", how="semi")
    assert own["pass_id"].drop_nulls().n_unique() == 3, "three pairs share no reply with a label"
    for name in OBJECTIVES:
        result = train(plan, store, name)
        assert result.first_step.difference == 0.0
        assert result.steps["rewards/chosen"][0] == 0.0


def test_what_is_read_can_be_said(write_plan: WritePlan, write_labels: WriteLabels) -> None:
    objectives = {
        "default": OBJECTIVES["bco"],
        **{data: {**OBJECTIVES["bco"], "data": data} for data in ("pairs", "labels", "both")},
        "dpo": {"loss": "dpo", **OF},
    }
    plan, store = prepared(both(write_plan, write_labels, objectives=objectives))
    n = {name: len(examples_of(plan, store, name)) for name in objectives}
    pairs, labels = (read(store, t).filter(split="train").height for t in ("pairs", "labels"))
    assert n == {
        "default": pairs + labels,
        "both": pairs + labels,
        "pairs": pairs,
        "labels": labels,
        "dpo": pairs,
    }
    digests = {name: values_digest(examples_of(plan, store, name)) for name in objectives}
    assert digests["default"] == digests["both"]
    assert len(set(digests.values())) == 3 + (digests["dpo"] != digests["pairs"])
    assert "labels only" in str(plan.objectives["labels"])


@pytest.mark.parametrize("data", ["labels", "both"])
def test_a_loss_of_pairs_refuses_labels_in_the_plan(write_plan: WritePlan, data: str) -> None:
    path = write_plan(objectives={"it": {"loss": "dpo", "data": data, **OF}})
    with pytest.raises(PlanError, match=r"objectives.it.data: the loss dpo is one of pairs") as e:
        load_plan(path)
    assert "kto, bco_unpaired" in str(e.value)
    summed = {"loss": {"dpo": 1.0, "kto": 1.0}, "data": data, **OF}
    with pytest.raises(PlanError, match=r"objectives.it.data: the loss dpo \+ kto"):
        load_plan(write_plan(objectives={"it": summed}))


def test_what_is_not_there_is_named(write_plan: WritePlan, write_labels: WriteLabels) -> None:
    objectives = {"dpo": {"loss": "dpo", **OF}, "both": {**OBJECTIVES["bco"], "data": "both"}}
    plan, store = prepared(alone(write_plan, write_labels, objectives=objectives))
    with pytest.raises(TrainingError, match=r"dpo is a loss of pairs.* labels cannot train"):
        train(plan, store, "dpo")
    with pytest.raises(TrainingError, match="no pair is left to train on"):
        train(plan, store, "both")
    path = write_plan(objectives={"it": {**OBJECTIVES["bco"], "data": "labels"}})
    plan, store = prepared(path)
    with pytest.raises(TrainingError, match="no label is left"):
        train(plan, store, "it")


def test_an_audit_of_labels_alone_says_why_it_has_no_report(
    write_plan: WritePlan, write_labels: WriteLabels, tiny_model: Path
) -> None:
    models = {name: {"checkpoint": str(tiny_model)} for name in ("base", "other")}
    audits = {"theirs": {"reference": "base", "policy": "other"}}
    path = alone(write_plan, write_labels, models=models, audits=audits, objectives={})
    plan, store = tokenized(path)
    with pytest.raises(ScoringError, match="'theirs' has nothing to score: no pair"):
        score(plan, store, "theirs")


def test_a_label_turned_round_is_another_policy(
    write_plan: WritePlan, write_labels: WriteLabels
) -> None:
    objectives = {"bco": OBJECTIVES["bco"]}
    plan, store = prepared(alone(write_plan, write_labels, objectives=objectives))
    key, _ = key_of(plan, store, "base")
    examples = examples_of(plan, store, "bco")

    def identity(of: list[Example]) -> str:
        return policy_id(key, key, plan.objectives["bco"], plan.training, of, [])

    turned = [replace(examples[0], desirable=not examples[0].desirable), *examples[1:]]
    assert identity(examples) == identity(list(examples))
    assert identity(turned) != identity(examples)
    first = train(plan, store, "bco")
    assert not train(plan, store, "bco").trained
    trained_on = read(store, "labels").filter(split="train").row(0, named=True)
    source = Path(plan.sources["labels"].path)
    lines = source.read_text().splitlines()
    flags = ("true", "false") if trained_on["desirable"] else ("false", "true")
    lines[trained_on["row"]] = lines[trained_on["row"]].replace(*flags)
    source.write_text("\n".join(lines))
    run_intake(plan, store)
    tokenize(plan, store)
    assert score(plan, store, "base").n_scored == 0, "the tokens are the same"
    other = train(plan, store, "bco")
    assert other.trained
    assert other.policy_id != first.policy_id


def test_a_limit_is_of_labels_too(write_plan: WritePlan, write_labels: WriteLabels) -> None:
    _, store = tokenized(alone(write_plan, write_labels), "limit_pairs=7")
    ways = read(store, "label_sequences")
    assert ways.height == 7
    more = tokenized(alone(write_plan, write_labels), "limit_pairs=9")[1]
    assert set(ways["label_id"]) < set(read(more, "label_sequences")["label_id"])
