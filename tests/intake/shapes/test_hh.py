"""HH-RLHF transcripts."""

import pytest
from published import one_pair, refused, turn

from pipeline.sources import Unit

ASK, ANSWER = turn("user", "q?"), turn("assistant", "yes")


def hh(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


def test_a_transcript_of_several_turns() -> None:
    shared = ("Human: How?", "Assistant: Like this.\n\nThen that.", "Human:  And: Human: why? ")
    unit = one_pair(
        "hh",
        {
            "chosen": hh(*shared, "Assistant: Because."),
            "rejected": hh(*shared, "Assistant: No"),
            "k": 1,
        },
    )
    assert unit == Unit(
        [
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": "Like this.\n\nThen that."},
            {"role": "user", "content": "And: Human: why?"},
        ],
        "Because.",
        "No",
        meta={"k": 1},
    )


def test_a_role_that_repeats_is_kept_as_it_is() -> None:
    shared = ("Human: a", "Human: b", "Assistant: c")
    unit = one_pair(
        "hh", {"chosen": hh(*shared, "Assistant: d"), "rejected": hh(*shared, "Assistant: e")}
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
    unit = one_pair(
        "hh",
        {
            "chosen": " \n" + hh("Human: q?", "Assistant: a"),
            "rejected": hh("Human: q?", "Assistant:"),
        },
    )
    assert (unit.prompt, unit.chosen, unit.rejected) == ([ASK], "a", "")
