"""Shapes with several candidates in a row, and HelpSteer's with rivals in other rows."""

from typing import Any

import pytest
from published import Row, one_pair, read_rows, refused, rules, said, turn, user

from pipeline.sources import Candidate, Unit

NEMO: Row = {
    "context": [user("q?")],
    "completions": [
        {"rank": 0, "completion": [said("yes")]},
        {"rank": 1, "completion": [said("no")]},
    ],
}
RANKED: Row = {"prompt": "q?", "responses": ["yes", "maybe", "no"]}
SCORED: Row = {"prompt": "q?", "responses": ["no", "yes", "maybe"], "scores": [1, 9, 5]}
ULTRA: Row = {
    "instruction": "q?",
    "completions": [
        {"response": "no", "overall_score": 2, "fine-grained_score": 5.0, "model": "a"},
        {"response": "yes", "overall_score": 8.5, "fine-grained_score": 1.0, "model": "b"},
    ],
}
STEER: Row = {"prompt": "q?", "response_1": "yes", "response_2": "no", "preference_strength": -1}
RATED: Row = {"prompt": "q?", "response": "yes", "helpfulness": 4, "verbosity": 1}
GOOD = {
    "nemo": NEMO,
    "ranked": RANKED,
    "scored": SCORED,
    "ultrafeedback": ULTRA,
    "helpsteer": STEER,
}


@pytest.mark.parametrize("shape", GOOD)
def test_the_better_one_is_chosen(shape: str) -> None:
    unit = one_pair(shape, GOOD[shape])
    assert (unit.prompt, unit.chosen, unit.rejected) == ([user("q?")], "yes", "no")


@pytest.mark.parametrize(
    ("shape", "change", "rule", "names"),
    [
        ("nemo", {"context": None}, "missing_field", "'context'"),
        ("nemo", {"context": {}}, "wrong_type", "'context'"),
        ("nemo", {"completions": None}, "missing_field", "'completions'"),
        ("nemo", {"completions": {}}, "wrong_type", "'completions'"),
        ("ranked", {"prompt": None}, "missing_field", "'prompt'"),
        ("ranked", {"prompt": 5}, "wrong_type", "'prompt'"),
        ("ranked", {"responses": None}, "missing_field", "responses, completions, answers"),
        ("ranked", {"responses": "yes"}, "wrong_type", "'responses'"),
        ("ranked", {"ranks": [1, 2]}, "lengths_differ", "'ranks' has 2 entries, 'responses' 3"),
        ("ranked", {"ranks": 1}, "wrong_type", "'ranks'"),
        ("ranked", {"images": ["x"]}, "unsupported_content", "'images'"),
        ("scored", {"scores": None}, "missing_field", "scores"),
        ("scored", {"scores": [1]}, "lengths_differ", "'scores' has 1 entries, 'responses' 3"),
        ("ultrafeedback", {"instruction": ["q?"]}, "wrong_type", "'instruction'"),
        ("ultrafeedback", {"completions": "x"}, "wrong_type", "'completions'"),
        ("helpsteer", {"prompt": None}, "missing_field", "'prompt'"),
        ("helpsteer", {"response_2": None}, "missing_field", "'response_2'"),
        ("helpsteer", {"response_1": 5}, "wrong_type", "'response_1'"),
        ("helpsteer", {"preference_strength": None}, "missing_field", "'preference_strength'"),
        ("helpsteer", {"preference_strength": "1"}, "wrong_type", "'preference_strength'"),
        ("helpsteer", {"preference_strength": -100}, "score_out_of_scale", "-100"),
        ("helpsteer", {"preference_strength": 0}, "tied", "1 and 2"),
        ("helpsteer", {"response_1": None, "response_2": None}, "missing_field", "'response'"),
    ],
)
def test_each_fault_of_a_row(shape: str, change: Row, rule: str, names: str) -> None:
    found, detail = refused(shape, {**GOOD[shape], **change})
    assert (found, names in detail) == (rule, True)


@pytest.mark.parametrize(
    ("shape", "bad", "rule"),
    [
        ("nemo", "yes", "wrong_type"),
        ("nemo", {"completion": [said("x")]}, "missing_field"),
        ("nemo", {"rank": "0", "completion": [said("x")]}, "wrong_type"),
        ("nemo", {"rank": 10**400, "completion": [said("x")]}, "strength_not_finite"),
        ("nemo", {"rank": 0}, "missing_field"),
        ("nemo", {"rank": 0, "completion": []}, "no_reply"),
        ("nemo", {"rank": 0, "completion": [user("x")]}, "no_reply"),
        ("nemo", {"rank": 0, "completion": [said("x"), said("y")]}, "unsupported_content"),
        ("nemo", {"rank": 0, "completion": [said("")]}, "empty_reply"),
        ("ranked", 5, "wrong_type"),
        ("ranked", {"text": "x", "rank": 0}, "wrong_type"),
        ("ranked", " \n", "empty_reply"),
        ("ultrafeedback", "yes", "wrong_type"),
        ("ultrafeedback", {"overall_score": 9}, "missing_field"),
        ("ultrafeedback", {"response": "x"}, "missing_field"),
        ("ultrafeedback", {"response": "x", "overall_score": None}, "missing_field"),
        ("ultrafeedback", {"response": "x", "overall_score": "9"}, "wrong_type"),
        (
            "ultrafeedback",
            {"response": "x", "overall_score": 10, "fine-grained_score": 2},
            "score_contradicts_label",
        ),
    ],
)
def test_a_bad_candidate_does_not_cost_its_list(shape: str, bad: Any, rule: str) -> None:
    """The pair is that of the others; the bad one is named."""
    field = "responses" if shape == "ranked" else "completions"
    error, unit = read_rows(shape, {**GOOD[shape], field: [*GOOD[shape][field], bad]})
    assert rules([error]) == [rule]
    assert unit == one_pair(shape, GOOD[shape])


def test_a_bad_score_does_not_cost_its_list() -> None:
    bad = {"responses": [*SCORED["responses"], "x"], "scores": [*SCORED["scores"], None]}
    error, unit = read_rows("scored", {**SCORED, **bad})
    assert rules([error]) == ["missing_field"]
    assert unit == one_pair("scored", SCORED)
    error, unit = read_rows("ranked", {**RANKED, "ranks": [1, "2", 3]})
    assert rules([error]) == ["wrong_type"]
    assert isinstance(unit, Unit)


def test_one_good_candidate_has_no_rival() -> None:
    found = read_rows("nemo", {**NEMO, "completions": [NEMO["completions"][0], 5]})
    assert rules(found) == ["wrong_type", "no_rival"]
    assert rules(read_rows("ranked", {**RANKED, "responses": []})) == ["no_rival"]


def test_equal_ranks_are_a_tie() -> None:
    tie = [{**entry, "rank": 1} for entry in NEMO["completions"]]
    assert rules(read_rows("nemo", {**NEMO, "completions": tie})) == ["tied"]


def test_objects_with_ranks_or_scores() -> None:
    answers = [{"answer": "no", "rank": 7}, {"answer": "yes", "rank": 1}]
    unit = one_pair("ranked", {"prompt": "q?", "answers": answers})
    assert (unit.chosen, unit.strength, unit.scores) == ("yes", 6.0, None)
    listed = {"prompt": "q?", "responses": answers, "ranks": [1, 2]}
    assert one_pair("ranked", listed).chosen == "no"  # what the row says of them goes before

    candidates = [{"content": "no", "score": 1, "reward": 9, "k": 1}, {"text": "yes", "score": 2}]
    unit = one_pair("scored", {"prompt": "q?", "candidates": candidates})
    assert (unit.chosen, unit.scores) == ("yes", (2.0, 1.0))
    assert unit.meta == {"rejected_candidate": {"reward": 9, "k": 1}}


def test_another_score_may_rank() -> None:
    unit = one_pair("ultrafeedback", ULTRA, score="fine-grained_score")
    assert (unit.chosen, unit.scores) == ("no", (5.0, 1.0))
    assert unit.meta["chosen_candidate"] == {"overall_score": 2, "model": "a"}
    # A ten on a scale of its own says nothing about the fine-grained scores.
    tens = [{"response": "no", "q": 1}, {"response": "yes", "q": 10, "fine-grained_score": 1.0}]
    assert one_pair("ultrafeedback", {**ULTRA, "completions": tens}, score="q").chosen == "yes"
    unit = one_pair("scored", {**SCORED, "rewards": [9, 1, 5]}, score="rewards")
    assert (unit.chosen, unit.meta) == ("no", {"scores": [1, 9, 5]})
    assert rules(read_rows("ultrafeedback", ULTRA, score="x"))[:2] == ["missing_field"] * 2


@pytest.mark.parametrize(
    ("overall", "fine", "kept"),
    [(10, 2.0, False), (10.0, 1, False), (10, 2.25, True), (9.5, 1.0, True), (10, None, True)],
)
def test_a_ten_for_the_worst(overall: float, fine: float | None, kept: bool) -> None:
    third = {"response": "x", "overall_score": overall, "fine-grained_score": fine}
    row = {**ULTRA, "completions": [*ULTRA["completions"], third]}
    found = read_rows("ultrafeedback", row)
    assert rules(found) == ([] if kept else ["score_contradicts_label"])
    assert [unit.chosen for unit in found if isinstance(unit, Unit)] == ["x" if kept else "yes"]


def test_all_pairs_of_a_list() -> None:
    found = read_rows("ranked", RANKED, pairing="all")
    pairs = [(u.chosen, u.rejected, u.strength) for u in found if isinstance(u, Unit)]
    assert pairs == [("yes", "maybe", 1.0), ("yes", "no", 2.0), ("maybe", "no", 1.0)]


# HelpSteer


@pytest.mark.parametrize("field", ["preference_strength", "overall_preference"])
@pytest.mark.parametrize(("value", "chosen"), [(-3, "yes"), (-1, "yes"), (1, "no"), (2.0, "no")])
def test_a_negative_preference_is_for_the_first(field: str, value: float, chosen: str) -> None:
    row = {"prompt": "q?", "response1": "yes", "response2": "no", field: value, "domain": "x"}
    unit = one_pair("helpsteer", row)
    assert (unit.chosen, unit.strength, unit.meta) == (chosen, abs(value), {"domain": "x"})


def test_a_small_preference_may_be_none() -> None:
    assert refused("helpsteer", STEER, min_gap=2)[0] == "gap_too_small"
    assert one_pair("helpsteer", {**STEER, "preference_strength": 2}, min_gap=2).chosen == "no"


def test_an_attribute_row_is_a_candidate() -> None:
    (found,) = read_rows("helpsteer", RATED)
    assert found == Candidate([user("q?")], "yes", 4.0, {"verbosity": 1})
    (found,) = read_rows("helpsteer", RATED, score="verbosity")
    assert found == Candidate([user("q?")], "yes", 1.0, {"helpfulness": 4})
    assert refused("helpsteer", {**RATED, "helpfulness": None})[0] == "missing_field"
    assert refused("helpsteer", {**RATED, "helpfulness": True})[0] == "wrong_type"


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("a", [user("a")]),
        ("a\n", [user("a\n")]),
        (
            "a\n<extra_id_1>Assistant\nb\n\nc\n<extra_id_1>User\nd",
            [user("a"), said("b\n\nc"), user("d")],
        ),
        (
            "<extra_id_0>System\nbe brief\n<extra_id_1>User\na\n<extra_id_1>Assistant\n",
            [turn("system", "be brief"), user("a")],
        ),
        ("a\n<extra_id_1>Assistant", [user("a")]),
        ("what is <extra_id_1>?", [user("what is <extra_id_1>?")]),
        ("say <extra_id_1>User\nnow", [user("say <extra_id_1>User\nnow")]),
    ],
)
def test_the_turns_of_a_helpsteer_prompt(prompt: str, turns: list[Any]) -> None:
    assert one_pair("helpsteer", {**STEER, "prompt": prompt}).prompt == turns
