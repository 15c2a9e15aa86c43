"""Pairs of a list, against all the pairs there are."""

from itertools import combinations
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import user

from pipeline.sources import Candidate, ReadOptions, RowError, Unit, pair
from pipeline.sources.base import Pairing

ASKED = [user("q?")]


def paired(scores: list[float], how: Pairing, min_gap: float = 0.0) -> list[Any]:
    """Each pair as the places of its two candidates, each fault as its rule."""
    candidates = [Candidate(ASKED, f"c{i}", score) for i, score in enumerate(scores)]
    found = pair(candidates, ReadOptions(pairing=how, min_gap=min_gap))
    return [
        unit.rule if isinstance(unit, RowError) else (int(unit.chosen[1:]), int(unit.rejected[1:]))
        for unit in found
    ]


@pytest.mark.parametrize(
    ("scores", "how", "min_gap", "expected"),
    [
        ([1, 3, 2], "best_worst", 0, [(1, 0)]),
        ([1, 3, 2], "adjacent", 0, [(1, 2), (2, 0)]),
        ([1, 3, 2], "all", 0, [(1, 2), (1, 0), (2, 0)]),
        # Of several best the first, of several worst the last.
        ([2, 2, 1, 1], "best_worst", 0, [(0, 3)]),
        ([2, 2, 1], "adjacent", 0, ["tied", (1, 2)]),
        ([2, 2, 1], "all", 0, ["tied", (0, 2), (1, 2)]),
        ([5, 5], "best_worst", 0, ["tied"]),
        ([1, 3, 2], "best_worst", 2, [(1, 0)]),
        ([1, 3, 2], "best_worst", 2.5, ["gap_too_small"]),
        ([1, 3, 2], "all", 2, ["gap_too_small", (1, 0), "gap_too_small"]),
        ([0.0, -0.0], "all", 0, ["tied"]),
        ([1e308, -1e308], "all", 0, ["strength_not_finite"]),
        ([1], "all", 0, ["no_rival"]),
        ([], "best_worst", 0, ["no_rival"]),
    ],
)
def test_which_pairs_are_made(
    scores: list[float], how: Pairing, min_gap: float, expected: list[Any]
) -> None:
    assert paired(scores, how, min_gap) == expected


SCORES = st.lists(st.integers(0, 4).map(float), min_size=2, max_size=6)


@given(SCORES, st.sampled_from(get_args(Pairing)), st.sampled_from([0.0, 1.0, 2.0]))
def test_every_pair_is_one_of_all(scores: list[float], how: Pairing, min_gap: float) -> None:
    """The oracle: every two candidates, the better first, at least `min_gap` and not 0 apart."""
    stated = {
        (i, j) if scores[i] > scores[j] else (j, i)
        for i, j in combinations(range(len(scores)), 2)
        if abs(scores[i] - scores[j]) >= max(min_gap, 1e-9)
    }
    found = paired(scores, how, min_gap)
    pairs = [entry for entry in found if isinstance(entry, tuple)]
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) <= stated
    n = len(scores)
    assert len(found) == {"best_worst": 1, "adjacent": n - 1, "all": n * (n - 1) // 2}[how]
    if how == "all":
        assert set(pairs) == stated
    if how == "best_worst" and pairs:
        assert scores[pairs[0][0]] == max(scores)
        assert scores[pairs[0][1]] == min(scores)
    if how == "adjacent":
        between = [(i, j, k) for i, j in pairs for k in scores if scores[j] < k < scores[i]]
        assert between == []


def test_blank_candidates_are_named_and_left_out() -> None:
    candidates = [Candidate(ASKED, text, score) for text, score in (("a", 1), (" \n", 9), ("b", 2))]
    error, unit = pair(candidates, ReadOptions())
    assert isinstance(error, RowError)
    assert (error.rule, "candidate 1" in error.detail) == ("empty_reply", True)
    assert isinstance(unit, Unit)
    assert (unit.chosen, unit.rejected) == ("b", "a")


def test_a_pair_knows_its_scores_and_where_it_comes_from() -> None:
    candidates = [Candidate(ASKED, "a", 1.5, {"model": "x"}), Candidate(ASKED, "b", 4.0)]
    common: dict[str, object] = {"source": "s"}
    (unit,) = pair(candidates, ReadOptions(), common)
    meta: dict[str, object] = {"source": "s", "rejected_candidate": {"model": "x"}}
    assert unit == Unit(ASKED, "b", "a", 2.5, (4.0, 1.5), meta)
    assert common == {"source": "s"}
    (unit,) = pair(candidates, ReadOptions(), ranked=True)
    assert isinstance(unit, Unit)
    assert (unit.strength, unit.scores) == (2.5, None)
