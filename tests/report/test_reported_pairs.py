"""Policies reported on a part of the training pairs: which, and that nothing is lost of sight."""

from typing import Any

import pytest
from support import prepared

from pipeline.names import reported_pairs
from pipeline.plan import load_plan
from pipeline.stages import compute_rewards, score, train, write_report
from pipeline.store import read

WritePlan = Any


@pytest.mark.parametrize("most", [0, 3, 100])
def test_held_out_pairs_and_some_training_pairs_are_scored(
    write_plan: WritePlan, most: int
) -> None:
    path = write_plan(scoring={"train_pairs": most})
    plan, store = prepared(path)
    train(plan, store, "dpo")
    splits = dict(read(store, "pairs")["split"].value_counts().iter_rows())
    expected = splits["test"] + min(most, splits["train"])
    assert splits["test"] > 0
    assert score(plan, store, "dpo").n_wanted == 2 * expected
    compute_rewards(plan, store, "dpo")
    rewards = read(store, "rewards/dpo")
    assert dict(rewards["split"].value_counts().iter_rows()) == {
        split: n
        for split, n in (("test", splits["test"]), ("train", min(most, splits["train"])))
        if n
    }
    pairs = write_report(plan, store, "dpo").rendered.numbers["pairs"]
    assert pairs["n_scored"] == expected
    assert pairs["n_left_out"] == splits["train"] - min(most, splits["train"])
    assert pairs["n_unaccounted"] == 0
    # More of them are the same ones and others; without the key it is all.
    ids = set(reported_pairs(plan, store)["pair_id"])
    more = load_plan(path, [f"scoring.train_pairs={most + 2}"])
    assert ids <= set(reported_pairs(more, store)["pair_id"])
    every = load_plan(path, ["scoring.train_pairs=null"])
    assert reported_pairs(every, store).height == sum(splits.values())
    assert score(every, store, "dpo").n_reused == 2 * expected
