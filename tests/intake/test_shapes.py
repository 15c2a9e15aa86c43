"""Readers: the published shapes of preference data."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.sources import READERS, RowError, Unit
from pipeline.sources.base import Message


def turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


ASK, ANSWER, OTHER = turn("user", "q?"), turn("assistant", "yes"), turn("assistant", "no")


FIELDS = st.sampled_from(["prompt", "chosen", "rejected", "strength", "role", "content", "x"])
MESSY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "user", "assistant", "\n\nHuman: a", "\n\nAssistant: b", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(READERS)), st.dictionaries(FIELDS, MESSY))
@example("conversational", {"chosen": [ANSWER], "rejected": [OTHER], "strength": 10**400})
@example("conversational", {"chosen": [{}], "rejected": [[]]})
def test_any_object_gives_units_or_a_row_error(shape: str, row: dict[str, object]) -> None:
    try:
        units = READERS[shape](row)
    except RowError:
        return
    for unit in units:
        assert all(isinstance(text, str) for text in (unit.chosen, unit.rejected))
        assert all(
            isinstance(message[key], str) for message in unit.prompt for key in ("role", "content")
        )


# Conversational


def conversational(**row: object) -> Unit:
    (unit,) = READERS["conversational"](row)
    return unit


def refused(shape: str, row: dict[str, object]) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        READERS[shape](row)
    return caught.value.rule, caught.value.detail


def test_an_explicit_and_an_implicit_prompt_are_one_pair() -> None:
    system = turn("system", "be brief")
    explicit = conversational(prompt=[system, ASK], chosen=[ANSWER], rejected=[OTHER])
    implicit = conversational(chosen=[system, ASK, ANSWER], rejected=[system, ASK, OTHER])
    mixed = conversational(prompt=[system], chosen=[ASK, ANSWER], rejected=[ASK, OTHER])
    null = conversational(prompt=None, chosen=[system, ASK, ANSWER], rejected=[system, ASK, OTHER])
    assert explicit == implicit == mixed == null == Unit([system, ASK], "yes", "no", None, {})


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
        ({"prompt": "text"}, "wrong_type", "'prompt' is a str"),
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
    assert conversational(chosen=[ASK, plain], rejected=[ASK, OTHER]).chosen == "yes"


# HH-RLHF


def hh(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


def test_a_transcript_of_several_turns() -> None:
    shared = ("Human: How?", "Assistant: Like this.\n\nThen that.", "Human:  And: Human: why? ")
    (unit,) = READERS["hh"](
        {
            "chosen": hh(*shared, "Assistant: Because."),
            "rejected": hh(*shared, "Assistant: No"),
            "k": 1,
        }
    )
    assert unit == Unit(
        [
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": "Like this.\n\nThen that."},
            {"role": "user", "content": "And: Human: why?"},
        ],
        "Because.",
        "No",
        None,
        {"k": 1},
    )


def test_a_role_that_repeats_is_kept_as_it_is() -> None:
    shared = ("Human: a", "Human: b", "Assistant: c")
    (unit,) = READERS["hh"](
        {"chosen": hh(*shared, "Assistant: d"), "rejected": hh(*shared, "Assistant: e")}
    )
    assert [message["role"] for message in unit.prompt] == ["user", "user", "assistant"]
    assert (unit.chosen, unit.rejected) == ("d", "e")


@pytest.mark.parametrize(
    ("chosen", "rule", "names"),
    [
        (None, "missing_field", "'chosen'"),
        ([ASK, ANSWER], "wrong_type", "list"),
        ("", "not_a_transcript", "'chosen'"),
        ("just text", "not_a_transcript", "'chosen'"),
        ("Well. " + hh("Human: q?", "Assistant: yes"), "not_a_transcript", "'chosen'"),
        ("\n\nhuman: q?\n\nassistant: yes", "not_a_transcript", "'chosen'"),
        (hh("Human:"), "no_reply", "chosen"),
        (hh("Human: q?"), "no_reply", "chosen"),
        (hh("Human: q?", "Assistant: yes", "Human: more?"), "no_reply", "chosen"),
        (hh("Human: p?", "Assistant: yes"), "prompts_differ", "turn 0"),
        (
            hh("Human: q?", "Assistant: yes", "Human: r?", "Assistant: s"),
            "prompts_differ",
            "turn 1",
        ),
        (hh("Assistant: yes"), "prompts_differ", "turn 0"),
    ],
)
def test_each_fault_of_a_transcript(chosen: object, rule: str, names: str) -> None:
    found, detail = refused("hh", {"chosen": chosen, "rejected": hh("Human: q?", "Assistant: no")})
    assert found == rule
    assert names in detail


def test_white_space_before_the_first_turn_is_no_text() -> None:
    (unit,) = READERS["hh"](
        {
            "chosen": " \n" + hh("Human: q?", "Assistant: a"),
            "rejected": hh("Human: q?", "Assistant:"),
        }
    )
    assert (unit.prompt, unit.chosen, unit.rejected) == ([ASK], "a", "")


def test_every_shape_of_a_plan_has_a_reader() -> None:
    from typing import get_args

    from pipeline.plan import SourceConfig

    assert set(get_args(SourceConfig.model_fields["shape"].annotation)) == set(READERS)
