"""Shapes whose prompts and replies are plain texts: standard, unpaired, alpaca."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import one_pair, read_rows, refused, said, turn, user

from pipeline.sources import Label

TRANSCRIPT = "\n\nHuman: q?\n\nAssistant: a\n\nHuman: r?\n\nAssistant:"
TOLD = [user("q?"), said("a"), user("r?")]


# Standard


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "replies"),
    [
        ("q?\nyes", "q?\nno", "q?", ("yes", "no")),
        ("q?\n\nyes", "q?\n\nno", "q?", ("yes", "no")),
        # TRL's own prompt would be "q?\nThe capital is ", which eats the replies' opening.
        (
            "q?\nThe capital is Rome.",
            "q?\nThe capital is Oslo.",
            "q?",
            ("The capital is Rome.", "The capital is Oslo."),
        ),
        ("The sky is blue.", "The sky is green.", "The sky is", ("blue.", "green.")),
        # Cut inside a word, the prompt would be "The sky is gre".
        ("The sky is grey.", "The sky is green.", "The sky is", ("grey.", "green.")),
        ("q?\nyes", "q?\n", "q?", ("yes", "")),
        ("q?\nsame", "q?\nsame", "q?", ("same", "same")),
        ("a\u3000b", "a\u3000c", "a", ("b", "c")),
    ],
)
def test_an_implicit_prompt_ends_with_a_line_or_a_word(
    chosen: str, rejected: str, prompt: str, replies: tuple[str, str]
) -> None:
    unit = one_pair("standard", {"chosen": chosen, "rejected": rejected})
    assert (unit.prompt, unit.chosen, unit.rejected) == ([user(prompt)], *replies)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("yes", "no"), ("yes", "yesterday"), ("", ""), ("\nyes", "\nno"), (" a", " b")],
)
def test_texts_that_do_not_begin_alike_have_no_prompt(chosen: str, rejected: str) -> None:
    found = refused("standard", {"chosen": chosen, "rejected": rejected})
    assert found == ("prompts_differ", "no 'prompt', and the texts do not begin alike")


WORDS = st.text(st.sampled_from("ab \n"), max_size=12)


@given(WORDS, WORDS, WORDS)
def test_an_implicit_prompt_loses_no_text(shared: str, one: str, other: str) -> None:
    """Prompt and reply are the text again, but for white space where they meet."""
    from pipeline.sources import READERS, ReadOptions, RowError, Unit

    row: dict[str, object] = {"chosen": shared + one, "rejected": shared + other}
    try:
        (unit,) = READERS["standard"](row, ReadOptions())
    except RowError:
        return
    assert isinstance(unit, Unit)
    asked = unit.prompt[0]["content"]
    for whole, reply in ((shared + one, unit.chosen), (shared + other, unit.rejected)):
        assert whole.startswith(asked)
        assert whole.endswith(reply)
        between = whole[len(asked) : len(whole) - len(reply)]
        assert between.strip() == ""
        assert between


def test_an_explicit_prompt_is_kept_to_the_letter() -> None:
    row = {"prompt": " q?\n", "chosen": " yes", "rejected": "q?\n no ", "margin": 2}
    unit = one_pair("standard", row)
    assert (unit.prompt, unit.chosen, unit.rejected) == ([user(" q?\n")], " yes", "q?\n no ")
    assert (unit.strength, unit.meta) == (None, {"margin": 2})
    assert one_pair("standard", row, columns={"strength": "margin"}).strength == 2.0


def test_a_transcript_is_read_as_its_turns() -> None:
    row = {"prompt": TRANSCRIPT, "chosen": " yes", "rejected": " no\n"}
    unit = one_pair("standard", row)
    assert (unit.prompt, unit.chosen, unit.rejected) == (TOLD, "yes", "no")
    whole = {"chosen": TRANSCRIPT + " yes", "rejected": TRANSCRIPT + " no"}
    assert one_pair("standard", whole) == one_pair("hh", whole) == unit
    quoted = one_pair("standard", {**row, "prompt": "Read: " + TRANSCRIPT})
    assert quoted.prompt == [user("Read: " + TRANSCRIPT)]


@pytest.mark.parametrize(
    ("change", "rule", "names"),
    [
        ({"chosen": None}, "missing_field", "'chosen'"),
        ({"rejected": None}, "missing_field", "'rejected'"),
        ({"chosen": [said("yes")]}, "wrong_type", "'chosen' is a list"),
        ({"rejected": 5}, "wrong_type", "'rejected' is a int"),
        ({"prompt": 5}, "wrong_type", "'prompt' is a int"),
        ({"strength": "3"}, "wrong_type", "'strength'"),
        ({"tools": [{}]}, "unsupported_content", "'tools'"),
    ],
)
def test_each_fault_of_a_standard_pair(change: dict[str, Any], rule: str, names: str) -> None:
    good = {"prompt": "q?", "chosen": "yes", "rejected": "no"}
    assert one_pair("standard", good).chosen == "yes"
    found, detail = refused("standard", {**good, **change})
    assert (found, names in detail) == (rule, True)


# Unpaired


def label(**row: Any) -> Label:
    (found,) = read_rows("unpaired", row)
    assert isinstance(found, Label)
    return found


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("q?", " yes", ([user("q?")], " yes")),
        ([user("q?")], "yes", ([user("q?")], "yes")),
        ([user("q?")], [said("yes")], ([user("q?")], "yes")),
        ("q?", [said("yes")], ([user("q?")], "yes")),
        ("q?", [user("q?"), said("yes")], ([user("q?")], "yes")),
        ("r?", [*TOLD, said("yes")], (TOLD, "yes")),
        (None, [*TOLD, said("yes")], (TOLD, "yes")),
        (TRANSCRIPT, " yes", (TOLD, "yes")),
    ],
)
def test_a_labelled_completion(prompt: Any, completion: Any, expected: Any) -> None:
    found = label(prompt=prompt, completion=completion, label=False, rating=2)
    assert (found.prompt, found.completion) == expected
    assert (found.desirable, found.meta) == (False, {"rating": 2})


@pytest.mark.parametrize(
    ("value", "desirable"), [(True, True), (False, False), (1, True), (0, False)]
)
def test_a_label_is_a_bool(value: object, desirable: bool) -> None:
    assert label(prompt="q?", completion="yes", label=value).desirable is desirable


@pytest.mark.parametrize(
    ("change", "rule", "names"),
    [
        ({"label": None}, "missing_field", "'label'"),
        ({"label": "true"}, "wrong_type", "'label'"),
        ({"label": 2}, "wrong_type", "'label'"),
        ({"label": -1}, "wrong_type", "'label'"),
        ({"label": 1.0}, "wrong_type", "'label'"),
        ({"label": [True]}, "wrong_type", "'label'"),
        ({"prompt": None}, "missing_field", "'prompt'"),
        ({"completion": None}, "missing_field", "'completion'"),
        ({"completion": 5}, "wrong_type", "'completion'"),
        ({"completion": []}, "no_reply", "completion"),
        ({"completion": [user("q?")]}, "no_reply", "completion"),
        ({"completion": [user("other"), said("yes")]}, "prompts_differ", "'prompt'"),
    ],
)
def test_each_fault_of_a_label(change: dict[str, Any], rule: str, names: str) -> None:
    good = {"prompt": "q?", "completion": "yes", "label": True}
    assert label(**good).desirable
    found, detail = refused("unpaired", {**good, **change})
    assert (found, names in detail) == (rule, True)


# Alpaca


@pytest.mark.parametrize(
    ("given", "asked"), [(None, "Do it."), ("", "Do it."), ("To this.", "Do it.\nTo this.")]
)
def test_an_input_follows_its_instruction(given: str | None, asked: str) -> None:
    row = {"instruction": "Do it.", "input": given, "chosen": "yes", "rejected": "no"}
    assert one_pair("alpaca", row).prompt == [user(asked)]


@pytest.mark.parametrize(
    ("change", "rule", "names"),
    [
        ({"instruction": None}, "missing_field", "'instruction'"),
        ({"instruction": ["Do it."]}, "wrong_type", "'instruction'"),
        ({"input": 5}, "wrong_type", "'input'"),
        ({"system": []}, "wrong_type", "'system'"),
        ({"chosen": None}, "missing_field", "'chosen'"),
        ({"rejected": {}}, "wrong_type", "'rejected'"),
        ({"history": "q"}, "wrong_type", "'history'"),
        ({"history": [["q", "a"], ["q"]]}, "wrong_type", "history[1]"),
        ({"history": [["q", None]]}, "wrong_type", "history[0]"),
        ({"history": [{"user": "q"}]}, "wrong_type", "history[0]"),
        ({"images": ["x.png"]}, "unsupported_content", "'images'"),
        ({"chosen": None, "kto_tag": True}, "missing_field", "'output'"),
        ({"chosen": None, "output": "x", "kto_tag": "yes"}, "wrong_type", "'kto_tag'"),
    ],
)
def test_each_fault_of_alpaca(change: dict[str, Any], rule: str, names: str) -> None:
    good = {"instruction": "Do it.", "chosen": "yes", "rejected": "no", "output": None}
    unit = one_pair("alpaca", {**good, "history": [], "system": None})
    assert (unit.prompt, unit.meta) == ([turn("user", "Do it.")], {"output": None})
    found, detail = refused("alpaca", {**good, **change})
    assert (found, names in detail) == (rule, True)
