"""`training.retrain`: which policy an objective has after data or the plan has changed."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support import build_tiny_model, prepared

from pipeline.errors import StoreError
from pipeline.names import policy_id_of
from pipeline.plan import Plan
from pipeline.stages import compute_rewards, score, train
from pipeline.store import Store, read
from pipeline.training.policy import PolicyResult, trained_examples

WritePlan = Any


def trained(path: Path, *overrides: str) -> tuple[Plan, Store, PolicyResult]:
    plan, store = prepared(path, "training.max_steps=1", *overrides)
    return plan, store, train(plan, store, "dpo")


def in_training(store: Store) -> set[str]:
    ways = read(store, "pair_sequences")
    pairs = read(store, "pairs").filter(split="train").join(ways, on="pair_id", how="semi")
    return set(pairs["pair_id"])


def test_three_runs_over_growing_data(write_plan: WritePlan, write_pairs: Any) -> None:
    """Every rule in a store of its own, over 12, 20 and 40 pairs."""
    found: dict[str, list[bool]] = {}
    for rule in ("always", "never", "{min_new_pairs: 10}", "{min_new_pairs: 1}"):
        path = write_plan(store=str(Path(write_pairs()).parent / rule.strip("{}")[-8:]))
        ids: list[str] = []
        before: set[str] = set()
        for n in (12, 20, 40):
            write_pairs(n)
            plan, store, result = trained(path, f"training.retrain={rule}")
            now = in_training(store)
            assert result.trained is (result.retained is None)
            if result.retained is not None:
                assert result.policy_id == ids[-1]
                assert result.retained.n_now == len(now)
                assert result.retained.n_new == len(now - before) > 0
                assert f"{len(now - before)} of {len(now)} pairs are new" in result.retained.reason
            else:
                assert result.policy_id not in ids
                before = now
            assert set(trained_examples(store, result.policy_id)["example_id"]) == before
            assert policy_id_of(store, "dpo") == result.policy_id
            ids.append(result.policy_id)
        # What comes after takes the kept policy, over today's pairs.
        score(plan, store, "dpo")
        compute_rewards(plan, store, "dpo")
        rewards = read(store, "rewards/dpo")
        assert rewards.height == 40
        assert rewards["policy_id"].unique().to_list() == ids[-1:]
        assert read(store, "training_steps/dpo")["policy_id"].unique().to_list() == ids[-1:]
        found[rule] = [a != b for a, b in pairwise(ids)]
    assert found == {
        "always": [True, True],
        "never": [False, False],
        "{min_new_pairs: 10}": [False, True],
        "{min_new_pairs: 1}": [True, True],
    }


def test_a_kept_policy_loads_no_model(
    write_plan: WritePlan, write_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_plan()
    _, _, first = trained(path)
    write_pairs(30)
    plan, store = prepared(path, "training.max_steps=1", "training.retrain=never")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pipeline.training.run.model.load_model", fail)
    assert train(plan, store, "dpo").policy_id == first.policy_id


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("objectives.dpo.beta=0.2", "values.beta"),
        ("objectives.dpo={loss: hinge, reference: base, start: base}", "loss"),
        ("training.learning_rate=2e-3", "training.learning_rate"),
        ("training.lora.rank=4", "training.lora"),
        ("training.where='row < 11'", "where"),
        ("training.weight='n_chosen'", "weight"),
        ("split.test_share=0.5", "split.test_share"),
        ("tokenization.max_length=1000", "tokenization"),
    ],
)
def test_a_change_of_the_plan_trains_anew(
    write_plan: WritePlan, override: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, never = write_plan(), "training.retrain=never"
    _, _, first = trained(path, never)
    with caplog.at_level("INFO", logger="pipeline"):
        _, _, second = trained(path, never, override)
    assert second.retained is None
    (said,) = (line for line in caplog.messages if "is not kept" in line)
    assert key in said.partition(": ")[2].removesuffix(" changed").split(", ")
    # The tokenisation has another id and gives the same tokens: the identity is the same.
    assert second.trained is (override != "tokenization.max_length=1000")
    assert (second.policy_id == first.policy_id) is not second.trained


def test_another_start_or_reference_trains_anew(
    write_plan: WritePlan, tiny_model: Path, tmp_path: Path
) -> None:
    build_tiny_model(tmp_path / "other", seed=5)
    models = {
        "base": {"checkpoint": str(tiny_model)},
        "other": {"checkpoint": str(tmp_path / "other")},
    }
    path, never = write_plan(models=models), "training.retrain=never"
    ids = {
        trained(path, never, *overrides)[2].policy_id
        for overrides in (
            (),
            ("objectives.dpo.reference=other",),
            ("objectives.dpo.reference=other", "objectives.dpo.start=other"),
        )
    }
    assert len(ids) == 3


def test_what_decides_no_weights_keeps_it(write_plan: WritePlan, write_pairs: Any) -> None:
    path, never = write_plan(), "training.retrain=never"
    _, _, first = trained(path, never)
    write_pairs(20)
    for override in ("report.beta=0.5", "training.checkpoint_every=7", "scoring.commit_rows=3"):
        assert trained(path, never, override)[2].policy_id == first.policy_id


def test_two_objectives_with_one_policy_have_their_own_words(
    write_plan: WritePlan, write_pairs: Any
) -> None:
    """They select the same, so they share a policy; what was said stands with the objective."""
    dpo = {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "base"}
    words = {"dpo": "row >= 0", "ours": "row > -1"}
    path = write_plan(objectives={name: {**dpo, "where": where} for name, where in words.items()})
    never = "training.retrain=never"
    for n in (12, 20):
        write_pairs(n)
        plan, store = prepared(path, never)
        found = [train(plan, store, name) for name in words]
        assert found[0].policy_id == found[1].policy_id
        assert [result.retained is None for result in found] == [n == 12, n == 12]
    for name, where in words.items():
        pointer = store.current(f"policies/{name}", ".json")
        assert json.loads(pointer.read_text())["settings"]["where"] == where


def test_pairs_that_are_held_out_by_now_are_counted(
    write_plan: WritePlan, write_pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path, never = write_plan(), "training.retrain=never"
    trained(path, never)
    also = json.dumps({"path": str(write_pairs(3, name="e.jsonl")), "shape": "conversational"})
    _, store, result = trained(path, never, f"evaluation={{more: {also}}}")
    used = trained_examples(store, result.policy_id)["example_id"]
    held = read(store, "pairs").filter(pl.col("split").is_in(["evaluation", "test"]))["pair_id"]
    assert result.retained is not None
    assert result.retained.n_held_out == len(set(used) & set(held)) > 0
    assert "are held out by now" in caplog.text


def test_a_policy_that_is_gone_is_trained_anew_and_a_damaged_list_is_not_believed(
    write_plan: WritePlan,
) -> None:
    path, never = write_plan(), "training.retrain=never"
    _, store, first = trained(path, never)
    listed = first.directory / "trained_examples.parquet"
    sound = listed.read_bytes()
    listed.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    with pytest.raises(StoreError, match=r"trained_examples\.parquet: damaged"):
        trained(path, never)
    first.directory.rename(store.root / "elsewhere")
    again = trained(path, never)[2]
    assert (again.policy_id, again.trained) == (first.policy_id, True)
    pointer = store.current("policies/dpo", ".json")
    pointer.write_text(pointer.read_text().replace("dpo", "ipo"))
    with pytest.raises(StoreError, match="damaged"):
        trained(path, never)
