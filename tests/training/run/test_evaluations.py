"""Evaluations on held-out pairs, the best one's weights, and stopping when it gets no better."""

import math
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file
from support import measured

from pipeline.errors import PlanError
from pipeline.plan import Plan, load_plan
from pipeline.stages import compute_rewards, score, train
from pipeline.store import Store, read
from pipeline.training.policy import PolicyResult
from schemas import TrainingEvaluation, polars_schema
from training.run.runs import STEPS, Desk, require_same, weights_of

BETA = 0.1
CONSTANT = {
    **STEPS,
    "warmup_share": 0.0,
    "schedule": "constant",
    "evaluate_every": 3,
    "learning_rate": 2e-3,
}
"""A run of three steps is the beginning of a longer one."""
OVERFIT = {
    **CONSTANT,
    "batch_pairs": 6,
    "epochs": 7,
    "learning_rate": 2e-3,
    "evaluate_every": 2,
}
"""With `noisy`: held-out pairs are ranked better at first, and then worse."""


@pytest.fixture
def noisy(write_pairs: Any) -> dict[str, Any]:
    """`sources` of pairs of which some say the contrary of the others."""
    generator = random.Random(4)
    rows = []
    for i in range(24):
        sides = [f"the answer is {i}", f"it depends on what was asked {i}"]
        if generator.random() < 0.15:
            sides.reverse()
        prompt, chosen, rejected = (
            [{"role": role, "content": text}]
            for role, text in zip(
                ("user", "assistant", "assistant"),
                (f"what is {i}, and what is {i}?", *sides),
                strict=True,
            )
        )
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    path = write_pairs(rows=rows, name="noisy.jsonl")
    return {"pairs": {"path": str(path), "shape": "conversational"}}


def recomputed(plan: Plan, store: Store) -> dict[str, float]:
    """The numbers of an evaluation, from the policy's and the reference's scores in the ledger."""
    score(plan, store, "dpo")
    compute_rewards(plan, store, "dpo")
    rewards = read(store, "rewards/dpo").filter(split="test")
    chosen, rejected = (
        BETA * (rewards[f"policy_{side}"] - rewards[f"ref_{side}"])
        for side in ("chosen", "rejected")
    )
    margins = (chosen - rejected).to_list()
    found = {
        "n": rewards.height,
        "eval_loss": sum(math.log1p(math.exp(-m)) for m in margins) / len(margins),
        "eval_rewards/chosen": chosen.mean(),
        "eval_rewards/rejected": rejected.mean(),
        "eval_rewards/margins": sum(margins) / len(margins),
        "eval_rewards/accuracies": sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins),
        "eval_logps/chosen": rewards["policy_chosen"].mean(),
        "eval_logps/rejected": rewards["policy_rejected"].mean(),
    }
    return {name: float(value) for name, value in found.items()}


def test_evaluations_are_what_the_ledger_says(write_plan: Any, tmp_path: Path) -> None:
    """Of the policy that each would have left, had training ended there."""
    desk = Desk(write_plan, tmp_path, training=CONSTANT)
    plan, store = desk.copy("training.max_steps=7")
    result = train(plan, store, "dpo")
    table = read(store, "training_evaluations/dpo")
    assert table.equals(result.evaluations)
    assert table.schema == polars_schema(TrainingEvaluation)
    assert table["step"].to_list() == [0, 3, 6, 7], "before the first, every third, and the last"
    at_start = table.row(0, named=True)
    assert at_start["eval_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert at_start["eval_rewards/margins"] == 0.0
    assert at_start["eval_rewards/accuracies"] == 0.5
    worst = 0.0
    for row in table.rows(named=True)[1:]:
        plan, store = desk.copy(f"training.max_steps={row['step']}")
        train(plan, store, "dpo")
        for name, expected in recomputed(plan, store).items():
            assert row[name] == pytest.approx(expected, abs=2e-4), (row["step"], name)
            worst = max(worst, abs(row[name] - expected))
        assert abs(row["eval_loss"] - recomputed(plan, store)["eval_loss"]) < 2e-5
        before = table.filter(pl.col("step") < row["step"])["eval_loss"]
        assert (before - row["eval_loss"]).abs().min() > 1e-3, "control: of another step"
    measured(f"evaluations against the ledger: {worst:.1e} at most, nats or rewards")


def test_fewer_pairs_are_always_the_same_ones(write_plan: Any, tmp_path: Path) -> None:
    desk = Desk(write_plan, tmp_path, training={**CONSTANT, "max_steps": 3})
    everything = desk.trained().evaluations
    few = desk.trained("training.evaluation_pairs=2").evaluations
    assert few["n"].to_list() == [2, 2]
    assert everything["n"][0] > 2
    assert few["eval_loss"][1] != everything["eval_loss"][1]
    assert few.equals(desk.trained("training.evaluation_pairs=2").evaluations)


def test_evaluating_does_not_change_the_weights(write_plan: Any, tmp_path: Path) -> None:
    desk = Desk(write_plan, tmp_path, training={**CONSTANT, "max_steps": 6})
    results = [desk.trained(), desk.trained("training.evaluate_every=null")]
    results.append(desk.trained("training.evaluate_every=1", "training.checkpoint_every=4"))
    assert [r.evaluations.height for r in results] == [3, 0, 7]
    assert len({r.policy_id for r in results}) == 1
    for other in results[1:]:
        assert weights_of(other) == weights_of(results[0])
        assert other.steps.equals(results[0].steps)


def eval_losses(result: PolicyResult) -> list[float]:
    return [float(loss) for loss in result.evaluations["eval_loss"]]


def test_the_best_evaluations_weights_are_kept(
    write_plan: Any, tmp_path: Path, noisy: dict[str, Any]
) -> None:
    """Seen from outside: the saved policy, scored, has that evaluation's loss."""
    training = {**OVERFIT, "keep_checkpoints": 1}
    desk = Desk(write_plan, tmp_path, training=training, sources=noisy)
    plan, store = desk.copy("training.keep_best=true")
    result = train(plan, store, "dpo")
    losses = eval_losses(result)
    best = losses.index(min(losses))
    assert result.kept == result.evaluations["step"][best]
    assert 0 < result.kept < result.steps.height, "neither the first nor the last"
    kept = recomputed(plan, store)["eval_loss"]
    assert kept == pytest.approx(min(losses), abs=2e-5)
    plan, store = desk.copy()
    last = train(plan, store, "dpo")
    assert last.kept == last.steps.height
    assert last.policy_id != result.policy_id
    control = recomputed(plan, store)["eval_loss"]
    assert control == pytest.approx(losses[-1], abs=2e-5)
    assert control > kept + 1e-3
    measured(f"eval loss of the best {kept:.4f} (step {result.kept}), of the last {control:.4f}")
    # It is the policy of a training that ended there.
    shorter = desk.trained(f"training.max_steps={result.kept}")
    weights = [
        load_file(r.directory / "adapter_model.safetensors") for r in (shorter, result, last)
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not all(weights[0][name].equal(weights[2][name]) for name in weights[0])


def test_another_metric_may_be_the_best(
    write_plan: Any, tmp_path: Path, noisy: dict[str, Any]
) -> None:
    desk = Desk(write_plan, tmp_path, training={**OVERFIT, "keep_best": True}, sources=noisy)
    result = desk.trained("training.best_metric=eval_logps/chosen")
    found = result.evaluations["eval_logps/chosen"].to_list()
    assert result.kept == result.evaluations["step"][found.index(max(found))], "more is better"


@pytest.mark.parametrize("patience", [1, 2])
def test_training_stops_when_it_gets_no_better(
    write_plan: Any, tmp_path: Path, noisy: dict[str, Any], patience: int
) -> None:
    desk = Desk(write_plan, tmp_path, training=OVERFIT, sources=noisy)
    whole = desk.trained()
    result = desk.trained(f"training.patience={patience}")
    losses = eval_losses(whole)
    best, waited, stop = math.inf, 0, len(losses)
    for i, loss in enumerate(losses):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == patience:
            stop = i + 1
            break
    assert stop < len(losses), "it does get worse"
    assert eval_losses(result) == losses[:stop]
    ended = whole.evaluations["step"][stop - 1]
    assert result.steps.height == result.evaluations["step"][-1] == ended
    assert result.kept == result.steps.height, "the best is not asked for"
    assert result.steps.drop("policy_id").equals(
        whole.steps.drop("policy_id").head(result.steps.height)
    )
    both = desk.trained(f"training.patience={patience}", "training.keep_best=true")
    assert both.kept == both.evaluations["step"][losses.index(min(losses[:stop]))]
    require_same(desk.trained(f"training.patience={patience}"), result)


def test_the_metric_must_be_one(write_plan: Any) -> None:
    path = write_plan(training={"evaluate_every": 2, "keep_best": True})
    with pytest.raises(PlanError, match=r"training\.best_metric.*eval_losss.*eval_loss, eval_rew"):
        load_plan(path, ["training.best_metric=eval_losss"])
    for name in ("step", "n", "policy_id"):
        with pytest.raises(PlanError, match=r"training\.best_metric"):
            load_plan(path, [f"training.best_metric={name}"])
