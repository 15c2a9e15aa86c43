"""A reference in other numerics than the trainer's: nothing of the difference enters training."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from support import build_tiny_model, prepared

from pipeline.errors import TrainingError
from pipeline.names import key_of
from pipeline.plan import Plan
from pipeline.scoring.ledger import read_logprobs, scorers
from pipeline.scoring.run import scorer_key
from pipeline.stages import compute_rewards, score, train
from pipeline.store import Store, read
from pipeline.training.data.correction import correct_reference
from pipeline.training.data.schedule import step_ids

WritePlan = Any


def values(frame: pl.DataFrame) -> dict[str, float]:
    return dict(frame.select("sequence_id", "logprob").iter_rows())


def plan_with(
    write_plan: WritePlan, reference: dict[str, Any], start: dict[str, Any], loss: str = "dpo"
) -> Path:
    objective = {"loss": loss, "beta": 0.1, "reference": "there", "start": "here"}
    path: Path = write_plan(
        models={"there": reference, "here": start}, objectives={"it": objective}
    )
    return path


def first_batch(plan: Plan, store: Store) -> pl.DataFrame:
    """The pairs of step 1 with their two sequences."""
    train_ids = sorted(read(store, "pairs").filter(pl.col("split") == "train")["pair_id"])
    batch = step_ids(dict.fromkeys(train_ids, 1), plan.training)[0]
    return read(store, "pair_sequences").filter(pl.col("pair_id").is_in(batch))


def test_one_model_in_two_numerics_starts_at_exactly_zero(
    write_plan: WritePlan, tiny_model: Path
) -> None:
    half = {"checkpoint": str(tiny_model), "dtype": "bfloat16"}
    single = {"checkpoint": str(tiny_model), "dtype": "float32"}
    plan, store = prepared(plan_with(write_plan, half, single), "training.max_steps=1")
    there, here = (
        values(read_logprobs(key_of(plan, store, name)[0])) for name in ("there", "here")
    )
    rows = first_batch(plan, store)
    uncorrected = [
        (here[c] - there[c]) - (here[r] - there[r])
        for c, r in rows.select("chosen_id", "rejected_id").iter_rows()
    ]
    assert max(map(abs, uncorrected)) > 1e-2, "control: the two numerics really differ"

    result = train(plan, store, "it")
    first = result.steps.row(0, named=True)
    assert first["rewards/margins"] == 0.0
    assert first["rewards/chosen"] == 0.0
    assert first["rewards/accuracies"] == 0.5
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-12)
    assert result.correction is not None
    differences = [abs(here[i] - there[i]) for i in here]
    assert 1e-2 < result.correction.largest <= max(differences)
    assert 0 < result.correction.mean < result.correction.largest
    again = train(plan, store, "it")
    assert (again.trained, again.correction) == (False, result.correction)


def test_another_reference_gets_the_starts_difference(
    write_plan: WritePlan, tiny_model: Path, tmp_path: Path
) -> None:
    """ref + (start here - start there): at step 0 the margins are those of the reference's own
    numerics, which both models have there."""
    other = build_tiny_model(tmp_path / "other", seed=5)
    half = {"checkpoint": str(other), "dtype": "bfloat16"}
    single = {"checkpoint": str(tiny_model), "dtype": "float32"}
    plan, store = prepared(plan_with(write_plan, half, single), "training.max_steps=1")
    result = train(plan, store, "it")
    reference_key, _ = key_of(plan, store, "there")
    _, start = key_of(plan, store, "here")
    start_there_key = scorer_key(store, plan.models["there"], start)
    reference, start_there = (
        values(read_logprobs(reference_key)),
        values(read_logprobs(start_there_key)),
    )
    start_here = values(read_logprobs(key_of(plan, store, "here")[0]))
    rows = first_batch(plan, store)
    expected, uncorrected = (
        0.1 * np.mean(
            [
                (start[c] - reference[c]) - (start[r] - reference[r])
                for c, r in rows.select("chosen_id", "rejected_id").iter_rows()
            ]
        )
        for start in (start_there, start_here)
    )  # fmt: skip
    found = result.steps["rewards/margins"][0]
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(found - uncorrected) > 1e-4, "control: without the correction"
    held_out = set(read(store, "pairs").filter(pl.col("split") == "test")["pair_id"])
    ways = read(store, "pair_sequences").filter(pl.col("pair_id").is_in(held_out))
    assert set(ways["chosen_id"]).isdisjoint(start_there), "only what is trained on is scored"


def test_the_policy_is_scored_in_its_references_numerics(
    write_plan: WritePlan, tiny_model: Path
) -> None:
    half = {"checkpoint": str(tiny_model), "dtype": "bfloat16"}
    single = {"checkpoint": str(tiny_model), "dtype": "float32"}
    plan, store = prepared(plan_with(write_plan, half, single), "training.max_steps=1")
    train(plan, store, "it")
    score(plan, store, "it")
    compute_rewards(plan, store, "it")
    table = scorers(store.ledger).unique("numerics_id")
    numerics = dict(table.select("numerics_id", "body_dtype").iter_rows())
    policy, _ = key_of(plan, store, "it")
    assert numerics[policy.numerics.numerics_id] == "bfloat16"
    reference, _ = key_of(plan, store, "there")
    assert policy.numerics.comparable(reference.numerics)


def test_a_loss_with_mismatched_replies_corrects_those_too(
    write_plan: WritePlan, tiny_model: Path
) -> None:
    half = {"checkpoint": str(tiny_model), "dtype": "bfloat16"}
    single = {"checkpoint": str(tiny_model), "dtype": "float32"}
    plan, store = prepared(plan_with(write_plan, half, single, "kto"), "training.max_steps=1")
    first = train(plan, store, "it").steps.row(0, named=True)
    assert first["kl"] == 0.0
    assert first["loss"] == pytest.approx(0.5, rel=1e-12), "1 - sigmoid(0) on both sides"


def test_a_loss_without_reference_needs_no_correction(
    write_plan: WritePlan, tiny_model: Path
) -> None:
    half = {"checkpoint": str(tiny_model), "dtype": "bfloat16"}
    single = {"checkpoint": str(tiny_model), "dtype": "float32"}
    objectives = {"it": {"loss": "simpo", "reference": "there", "start": "here"}}
    path = write_plan(models={"there": half, "here": single}, objectives=objectives)
    plan, store = prepared(path, "training.max_steps=1", "training.reference_correction=never")
    assert train(plan, store, "it").correction is None


def test_without_a_common_sequence_nothing_can_be_corrected(
    write_plan: WritePlan, tiny_model: Path
) -> None:
    single = {"checkpoint": str(tiny_model), "dtype": "float32"}
    plan, store = prepared(plan_with(write_plan, single, single))
    rows = read_logprobs(key_of(plan, store, "here")[0])
    with pytest.raises(TrainingError, match="scored three times"):
        correct_reference(rows.head(3), rows.tail(3), rows)


def test_the_correction_by_hand() -> None:
    def rows(**logprobs: float) -> pl.DataFrame:
        return pl.DataFrame({"sequence_id": list(logprobs), "logprob": list(logprobs.values())})

    reference, here, there = rows(a=-10.0, b=-20.0), rows(b=-21.5, a=-9.0), rows(a=-9.25, b=-22.0)
    corrected, added = correct_reference(reference, here, there)
    assert values(corrected) == {"a": -10.0 + 0.25, "b": -20.0 + 0.5}
    assert (added.n, added.mean, added.largest) == (2, 0.375, 0.5)
    awkward = rows(a=-0.1, b=-1e9 / 3)
    assert values(correct_reference(awkward, here, awkward)[0]) == values(here), "to the last bit"
