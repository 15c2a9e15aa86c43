"""Conversational pairs: TRL's, UltraFeedback binarised, Argilla's."""

from typing import Any

import pytest
from published import one_pair, refused, turn

from pipeline.sources import Unit

ASK, ANSWER, OTHER = turn("user", "q?"), turn("assistant", "yes"), turn("assistant", "no")


def conversational(**row: object) -> Unit:
    return one_pair("conversational", row)


def test_an_explicit_and_an_implicit_prompt_are_one_pair() -> None:
    system = turn("system", "be brief")
    explicit = conversational(prompt=[system, ASK], chosen=[ANSWER], rejected=[OTHER])
    implicit = conversational(chosen=[system, ASK, ANSWER], rejected=[system, ASK, OTHER])
    mixed = conversational(prompt=[system], chosen=[ASK, ANSWER], rejected=[ASK, OTHER])
    null = conversational(prompt=None, chosen=[system, ASK, ANSWER], rejected=[system, ASK, OTHER])
    assert explicit == implicit == mixed == null == Unit([system, ASK], "yes", "no")


def test_other_fields_survive_in_meta() -> None:
    unit = conversational(
        prompt=[ASK], chosen=[ANSWER], rejected=[OTHER], strength=2, source="x", score={"a": [1]}
    )
    assert unit.meta == {"source": "x", "score": {"a": [1]}}
    assert (unit.strength, type(unit.strength)) == (2.0, float)


@pytest.mark.parametrize(("strength", "expected"), [(None, None), (0, 0.0), (-1.5, -1.5), (3, 3.0)])
def test_a_strength_is_a_number_or_nothing(strength: object, expected: float | None) -> None:
    unit = conversational(chosen=[ASK, ANSWER], rejected=[ASK, OTHER], strength=strength)
    assert unit.strength == expected


@pytest.mark.parametrize(
    ("change", "rule", "names"),
    [
        ({"chosen": None}, "missing_field", "'chosen'"),
        ({"rejected": None}, "missing_field", "'rejected'"),
        ({"chosen": "text"}, "wrong_type", "'chosen' is a str"),
        ({"rejected": {}}, "wrong_type", "'rejected' is a dict"),
        ({"prompt": "text"}, "prompts_differ", "'prompt' is no turn"),
        ({"prompt": False}, "wrong_type", "'prompt' is a bool"),
        ({"chosen": [ASK, "yes"]}, "wrong_type", "chosen[1] is a str"),
        ({"chosen": [ASK, None]}, "wrong_type", "chosen[1]"),
        ({"chosen": [ASK, {"content": "x"}]}, "missing_field", "chosen[1] has no 'role'"),
        ({"chosen": [ASK, {"role": "assistant"}]}, "missing_field", "chosen[1] has no 'content'"),
        ({"chosen": [ASK, turn("assistant", 5)]}, "wrong_type", "chosen[1].content is a int"),
        ({"chosen": [ASK, turn("assistant", None)]}, "wrong_type", "chosen[1].content"),
        ({"chosen": [{"role": 1, "content": "x"}]}, "wrong_type", "chosen[0].role is a int"),
        (
            {"rejected": [turn("user", [{"type": "text", "text": "q?"}]), OTHER]},
            "unsupported_content",
            "rejected[0].content is a list",
        ),
        (
            {"chosen": [ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}]},
            "unsupported_content",
            "chosen[1] has 'tool_calls'",
        ),
        (
            {"prompt": [{**ASK, "images": ["x.png"]}]},
            "unsupported_content",
            "prompt[0] has 'images'",
        ),
        ({"chosen": []}, "no_reply", "chosen"),
        ({"rejected": [ASK]}, "no_reply", "rejected"),
        ({"chosen": [turn("user", "p?"), ANSWER]}, "prompts_differ", "turn 0"),
        ({"chosen": [ASK, OTHER, ASK, ANSWER]}, "prompts_differ", "turn 1"),
        ({"strength": True}, "wrong_type", "bool"),
        ({"strength": "3"}, "wrong_type", "str"),
        ({"strength": [1]}, "wrong_type", "list"),
        ({"strength": 10**400}, "strength_not_finite", "float64"),
    ],
)
def test_each_fault_of_a_conversation(change: dict[str, Any], rule: str, names: str) -> None:
    good = {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER], "strength": 1}
    assert conversational(**good).chosen == "yes"
    found, detail = refused("conversational", {**good, **change})
    assert found == rule
    assert names in detail


def test_empty_tool_fields_are_plain_text() -> None:
    """Some publishers write every key on every turn."""
    plain = {**ANSWER, "tool_calls": None, "images": [], "name": "x"}
    unit = conversational(chosen=[ASK, plain], rejected=[ASK, OTHER])
    assert unit.chosen == "yes"
    assert unit.meta == {"turn_fields": {"chosen[1]": {"name": "x"}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tools", '[{"type": "function"}]'),
        ("images", ["x.png"]),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_a_column_that_changes_the_text_is_unsupported(field: str, value: object) -> None:
    row = {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]}
    assert refused("conversational", {**row, field: value}) == (
        "unsupported_content",
        f"the row has '{field}'",
    )
    nothing: list[object] = [None, "", [], {}, "[]"]
    for empty in nothing:
        assert one_pair("conversational", {**row, field: empty}).chosen == "yes"


# A prompt that the lists hold too


def both(*before: Any) -> dict[str, Any]:
    return {"chosen": [*before, ANSWER], "rejected": [*before, OTHER]}


MORE = [ASK, turn("assistant", "a"), turn("user", "r?")]


@pytest.mark.parametrize(
    ("prompt", "lists", "expected"),
    [
        ("q?", both(), [ASK]),
        ("q?", both(ASK), [ASK]),
        (" q?\n", both(ASK), [ASK]),
        ("q?", both(turn("system", "s"), ASK), [turn("system", "s"), ASK]),
        ("q?", both(*MORE), MORE),
        ("r?", both(*MORE), MORE),
        ("", both(ASK), [ASK]),
        ([ASK], both(ASK), [ASK]),
        ([ASK], both(*MORE), MORE),
        # The control: a conversation that goes on after the prompt is not the prompt.
        ([turn("system", "s")], both(ASK), [turn("system", "s"), ASK]),
        ([ASK, turn("assistant", "a")], both(turn("user", "r?")), MORE),
        ("\n\nHuman: q?\n\nAssistant: a\n\nHuman: r?\n\nAssistant:", both(), MORE),
    ],
)
def test_a_prompt_is_not_doubled(prompt: Any, lists: dict[str, Any], expected: Any) -> None:
    unit = conversational(prompt=prompt, **lists)
    assert (unit.prompt, unit.chosen, unit.rejected) == (expected, "yes", "no")
    assert unit.meta == {}


def test_a_prompt_that_holds_the_whole_conversation_is_kept_in_meta() -> None:
    told = "User: q?\nAssistant: a\nUser: r?"
    unit = conversational(prompt=told, **both(*MORE))
    assert unit.prompt == MORE
    assert unit.meta == {"turn_fields": {"prompt": told}}
    assert refused("conversational", {"prompt": "User: q?", **both(*MORE)})[0] == "prompts_differ"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"score_chosen": 3, "score_rejected": 1}, (3.0, 1.0)),
        ({"chosen-rating": 1, "rejected-rating": 3}, (1.0, 3.0)),
        ({"rating_chosen": 2, "rating_rejected": 2}, (2.0, 2.0)),
        ({"chosen_score": None, "rejected_score": 1}, None),
        ({"chosen_score": 1}, None),
        ({}, None),
    ],
)
def test_scores_are_kept_for_the_rules_to_judge(
    fields: dict[str, Any], expected: tuple[float, float] | None
) -> None:
    unit = conversational(**both(ASK), **fields)
    assert unit.scores == expected
    assert unit.strength == (None if expected is None else expected[0] - expected[1])
    assert unit.meta == ({} if expected else fields)
    assert conversational(**both(ASK), **fields, strength=0.5).strength == 0.5


@pytest.mark.parametrize(
    ("scores", "rule"),
    [((1, "3"), "wrong_type"), ((10**400, 1), "strength_not_finite"),
     ((1e308, -1e308), "strength_not_finite")],
)  # fmt: skip
def test_scores_are_numbers(scores: tuple[Any, Any], rule: str) -> None:
    row = {**both(ASK), "score_chosen": scores[0], "score_rejected": scores[1]}
    assert refused("conversational", row)[0] == rule


def test_messages_that_are_not_the_chosen_ones_survive() -> None:
    row = both(ASK)
    assert conversational(**row, messages=row["chosen"]).meta == {}
    assert conversational(**row, messages=row["rejected"]).meta == {"messages": row["rejected"]}
