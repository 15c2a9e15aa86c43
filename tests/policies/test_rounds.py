"""One policy is the next one's start and reference: exactly 0 at its first step, then on."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scoring.oracle import Oracle
from support import measured, prepared

from pipeline.errors import StoreError
from pipeline.export.directory import export_policy
from pipeline.export.merged import merged_policy
from pipeline.models import Checkpoint
from pipeline.names import key_of, policy_of, scored_by, wanted_sequences
from pipeline.plan import load_plan, write_audit_plan
from pipeline.scoring.ledger import read_logprobs
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.stages import compute_rewards, score, train, write_report
from pipeline.store import read
from policies.exports import DPO, LEARNS, apart, chain, loaded, ran, sequences_in, sums

WritePlan = Any


def ledger(key: Any) -> dict[str, float]:
    return dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows())


def first(result: Any) -> dict[str, Any]:
    row: dict[str, Any] = result.steps.row(0, named=True)
    return row


def starts_at_zero(result: Any) -> bool:
    row = first(result)
    return (
        result.first_step.difference == 0.0
        and row["rewards/margins"] == row["rewards/chosen"] == row["rewards/rejected"] == 0.0
        and row["rewards/accuracies"] == 0.5
        and math.isclose(row["loss"], math.log(2), rel_tol=1e-12)
    )


def test_three_rounds_each_start_at_exactly_zero_and_go_on(write_plan: WritePlan) -> None:
    path = write_plan(objectives=chain("one", "two", "three"))
    plan, store, trained = ran(path, *LEARNS)
    assert list(plan.objectives) == ["one", "three", "two"], "as the file has them"
    assert list(trained) == ["one", "two", "three"]
    base = Path(plan.models["base"].checkpoint)
    rows = sequences_in(store)
    assert all(starts_at_zero(result) for result in trained.values())
    # Each policy, by the ledger, is all adapters so far over the base, by PEFT in float64.
    adapters: list[Path] = []
    before = sums(loaded(base), rows)
    said = []
    for name, result in trained.items():
        adapters.append(result.directory)
        expected = sums(loaded(base, *adapters), rows)
        held = ledger(key_of(plan, store, name)[0])
        found = {i: held[i] for i in expected}
        off, moved = apart(found, expected), apart(expected, before)
        said.append(f"{name} {off[-1]:.1e} (the round before: {moved[0]:.1e} to {moved[-1]:.1e})")
        assert off[-1] <= 1e-3
        assert moved[-1] > 1e-2, "control: the round before is another policy"
        before = expected
    measured(f"nats from PEFT in float64, at most: {'; '.join(said)}")
    rewards = {name: read(store, f"rewards/{name}") for name in trained}
    assert all(table["logratio_chosen"].abs().to_numpy().max() > 1e-2 for table in rewards.values())
    # Round by round the log-ratios add up to the whole way from the base.
    held, start = (ledger(key_of(plan, store, name)[0]) for name in ("three", "base"))
    ways = {row["pair_id"]: row["chosen_id"] for row in read(store, "pair_sequences").to_dicts()}
    total = pl.concat(rewards.values()).group_by("pair_id").agg(pl.sum("logratio_chosen"))
    for pair, ratio in total.iter_rows():
        assert ratio == pytest.approx(held[ways[pair]] - start[ways[pair]], abs=1e-9)


def test_the_gate_and_the_zero_are_no_accident(write_plan: WritePlan) -> None:
    """From one's policy but against the base, the second round does not start at 0; and an adapter
    that is applied has other bits than one that is merged."""
    objectives = chain("one")
    objectives["two"] = {**DPO, "start": "one", "reference": "base"}
    plan, store, trained = ran(write_plan(objectives=objectives), *LEARNS)
    assert trained["two"].first_step.difference == 0.0
    assert not starts_at_zero(trained["two"])
    batch = first(trained["two"])
    assert batch["rewards/margins"] != 0.0
    margins = read(store, "rewards/one").filter(split="train")["margin"].to_numpy()
    low, high = margins.min(), margins.max()
    assert low <= batch["rewards/margins"] <= high, "where round one has come to"

    directory, start = policy_of(plan, store, "one")
    applied, config = Checkpoint(start.path, directory), plan.models["base"]
    key = scorer_key(store, config, applied)
    score_sequences("one", key, config, applied, wanted_sequences(plan, store, "one"), plan.scoring)
    merged_key, merged = key_of(plan, store, "one")
    assert merged == Checkpoint(merged_policy(store, directory, start.path))
    differences = apart(ledger(key), ledger(merged_key))
    measured(f"merged against applied, float32: at most {differences[-1]:.1e} nats")
    assert 0 < differences[-1] <= 1e-3


def test_a_policy_nobody_needs_stays_an_adapter(write_plan: WritePlan) -> None:
    plan, store, trained = ran(write_plan(objectives=chain("one", "two")), "training.max_steps=1")
    _, checkpoint = scored_by(plan, store, "two")
    assert checkpoint.adapter == trained["two"].directory
    assert checkpoint.path == scored_by(plan, store, "one")[1].path
    assert scored_by(plan, store, "one")[1].adapter is None
    assert len(list(store.policies.glob("*-merged-*"))) == 1


def test_a_base_scores_what_a_model_scores(write_plan: WritePlan) -> None:
    objectives = chain("one")
    objectives["two"] = {"loss": "kto", "start": "one", "reference": "one"}
    plan, store, trained = ran(
        write_plan(objectives=objectives),
        *LEARNS,
        "scoring.train_pairs=0",
        "training.batch_pairs=3",
    )
    wanted = {name: wanted_sequences(plan, store, name) for name in ("base", "one", "two")}
    kl = read(store, "kl_sequences/two")["sequence_id"].unique()
    everything = {*read(store, "sequences")["sequence_id"], *kl}
    assert set(wanted["one"]["sequence_id"]) == everything
    assert set(wanted["base"]["sequence_id"]) == set(read(store, "sequences")["sequence_id"])
    held_out = read(store, "pairs").filter(split="test").height
    assert wanted["two"].height == 2 * held_out == read(store, "rewards/two").height * 2
    assert read(store, "rewards/one").height == held_out
    row = first(trained["two"])
    assert row["kl"] == 0.0
    assert row["loss"] == pytest.approx(0.5, rel=1e-12), "1 - sigmoid(0) on both sides"
    assert trained["two"].steps["loss"][-1] != row["loss"]


def test_rounds_in_two_numerics_start_at_exactly_zero(
    write_plan: WritePlan, tiny_model: Path
) -> None:
    """The reference in bfloat16, training in float32: the policy is merged in float32, scored in
    bfloat16 where it is subtracted, and corrected where it is trained from."""
    models = {
        "there": {"checkpoint": str(tiny_model), "dtype": "bfloat16"},
        "here": {"checkpoint": str(tiny_model), "dtype": "float32"},
    }
    objectives = {
        "one": {**DPO, "start": "here", "reference": "there"},
        "two": {**DPO, "start": "one", "reference": "one"},
        "three": {"loss": "simpo", "start": "one", "reference": "there"},
    }
    plan, store, trained = ran(write_plan(models=models, objectives=objectives), *LEARNS)
    for name in ("one", "two"):
        row = first(trained[name])
        assert row["rewards/margins"] == 0.0
        assert row["rewards/accuracies"] == 0.5
        assert trained[name].correction.largest > 1e-2, "the two numerics differ"
        assert trained[name].first_step.difference == 0.0
    assert trained["three"].correction is None
    # SimPO has no reference to be corrected: its start's rows are of the other numerics.
    assert trained["three"].first_step.tolerance == 1.0
    key, _ = key_of(plan, store, "two")
    assert key.numerics.body_dtype == "bfloat16"
    reference, _ = key_of(plan, store, "one")
    assert key.numerics.comparable(reference.numerics)


def test_whole_models_go_through_rounds(write_plan: WritePlan) -> None:
    path = write_plan(objectives=chain("one", "two"))
    plan, store, trained = ran(path, "training.method=full", "training.learning_rate=1e-3")
    assert all(starts_at_zero(result) for result in trained.values())
    assert not list(store.policies.glob("*-merged-*"))
    rows = sequences_in(store)
    expected = sums(loaded(trained["two"].directory), rows)
    held = ledger(key_of(plan, store, "two")[0])
    assert apart({i: held[i] for i in expected}, expected)[-1] <= 1e-3
    assert apart(sums(loaded(trained["one"].directory), rows), expected)[-1] > 1e-3


def test_a_second_run_trains_scores_and_merges_nothing(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_plan(objectives=chain("one", "two"))
    _, _, before = ran(path, *LEARNS)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for where in ("scoring.engines.torch_engine", "training.run.model", "export.merged"):
        monkeypatch.setattr(f"pipeline.{where}.load_model", fail)
    _, _, after = ran(path, *LEARNS)
    for name, result in after.items():
        assert not result.trained
        assert result.policy_id == before[name].policy_id


def test_another_first_round_is_another_second_one(write_plan: WritePlan) -> None:
    path = write_plan(objectives=chain("one", "two"))
    plan, store, before = ran(path, *LEARNS)
    other = load_plan(path, [*LEARNS, "objectives.one.beta=0.5"])
    train(other, store, "one")
    # Round two's policy is still the one over the earlier round one.
    for work in (score, compute_rewards, write_report):
        with pytest.raises(StoreError, match=r"'two' was trained from another 'one'.*train it aga"):
            work(other, store, "two")
    score(other, store, "one")
    again = train(other, store, "two")
    assert again.trained
    assert again.policy_id != before["two"].policy_id
    assert score(other, store, "two").n_scored == 24
    train(plan, store, "one")
    with pytest.raises(StoreError, match="another 'one'"):
        score(plan, store, "two")


def test_without_its_first_round_a_second_cannot_begin(write_plan: WritePlan) -> None:
    plan, store = prepared(write_plan(objectives=chain("one", "two")))
    with pytest.raises(StoreError, match="nothing has been published under 'policies/one' yet"):
        train(plan, store, "two")


def test_reports_and_exports_name_the_round_before(write_plan: WritePlan, tmp_path: Path) -> None:
    plan, store, trained = ran(write_plan(objectives=chain("one", "two")), *LEARNS)
    said = write_report(plan, store, "two").rendered.numbers["provenance"]
    named = f"one: the policy {trained['one'].policy_id}"
    assert said["reference"] == said["start"] == named
    base = write_report(plan, store, "one").rendered.numbers["provenance"]
    assert base["start"].startswith("base: ")
    done = export_policy(plan, store, "two", tmp_path / "two", "adapter")
    assert done.start == named
    # An adapter of a later round needs the earlier round, not the base.
    rows = sequences_in(store)
    export_policy(plan, store, "one", tmp_path / "one")
    held = ledger(key_of(plan, store, "two")[0])
    found = {i: held[i] for i in rows["sequence_id"]}
    assert apart(sums(loaded(tmp_path / "one", tmp_path / "two"), rows), found)[-1] <= 1e-3
    alone = sums(loaded(Path(plan.models["base"].checkpoint), tmp_path / "two"), rows)
    assert apart(alone, found)[-1] > 1e-2, "control: over the base"


def test_an_audit_of_a_later_round_goes_over_its_own_start(
    write_plan: WritePlan, write_pairs: Any, tiny_model: Path
) -> None:
    plan, store, trained = ran(write_plan(objectives=chain("one", "two")), *LEARNS)
    pointer = store.current("policies/two", ".json")
    path = write_audit_plan(write_pairs(), str(tiny_model), str(pointer), store=store.root)
    audit, its = prepared(path, "scoring.null_test_rows=2")
    (name,) = audit.policies
    score(audit, its, name)
    compute_rewards(audit, its, name)
    judged = Oracle(scored_by(plan, store, "two")[1])
    base = Oracle(Checkpoint(tiny_model))
    rewards = {row["pair_id"]: row for row in read(its, f"rewards/{name}").to_dicts()}
    sequences = {row["sequence_id"]: row for row in read(its, "sequences").to_dicts()}
    wrong = Oracle(Checkpoint(tiny_model, trained["two"].directory))
    control = 0.0
    for way in read(its, "pair_sequences").head(4).to_dicts():
        row = sequences[way["chosen_id"]]
        ids = [np.array(row[f"{part}_ids"]) for part in ("prompt", "completion")]
        over = {name: m.logprobs(*ids).sum() for name, m in (("two", judged), ("wrong", wrong))}
        expected = over["two"] - base.logprobs(*ids).sum()
        assert rewards[way["pair_id"]]["logratio_chosen"] == pytest.approx(expected, abs=1e-3)
        control = max(control, abs(over["wrong"] - over["two"]))
    assert control > 1e-2, "over the audit's reference it is another model"
