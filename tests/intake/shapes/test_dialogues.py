"""Shapes with turns of their own: ShareGPT and OpenAI."""

from typing import Any

import pytest
from published import Row, gpt, human, one_pair, read_rows, refused, said, turn, user

from pipeline.sources import Label

PAIR: Row = {"conversations": [human("q?")], "chosen": gpt("yes"), "rejected": gpt("no")}
TAGGED: Row = {"conversations": [human("q?"), gpt("yes")], "kto_tag": True}
OPENAI: Row = {
    "input": {"messages": [user("q?")]},
    "preferred_output": [said("yes")],
    "non_preferred_output": [said("no")],
}


def test_a_system_turn_goes_before_the_column() -> None:
    """As in LLaMA-Factory; the column that is not used survives."""
    system = {"from": "system", "value": "turn"}
    column = one_pair("sharegpt", {**PAIR, "system": "column"})
    assert (column.prompt, column.meta) == ([turn("system", "column"), user("q?")], {})
    both = {**PAIR, "conversations": [system, human("q?")], "system": "column"}
    unit = one_pair("sharegpt", both)
    assert (unit.prompt[0], unit.meta) == (turn("system", "turn"), {"system": "column"})
    assert one_pair("sharegpt", {**PAIR, "system": ""}).prompt == [user("q?")]


def test_openais_names_of_roles_and_keys_serve_too() -> None:
    row = {"messages": [user("q?")], "chosen": said("yes"), "rejected": said("no")}
    assert one_pair("sharegpt", row) == one_pair("sharegpt", PAIR)


def test_a_pair_with_a_label_is_a_pair() -> None:
    assert one_pair("sharegpt", {**PAIR, "label": 3}).meta == {"label": 3}


def test_a_label_is_for_the_last_turn() -> None:
    longer = [human("q?"), gpt("a"), human("r?"), {**gpt("yes"), "weight": 1}]
    (found,) = read_rows("sharegpt", {"conversations": longer, "kto_tag": False, "id": 7})
    left = {"id": 7, "turn_fields": {"conversations[3]": {"weight": 1}}}
    assert found == Label([user("q?"), said("a"), user("r?")], "yes", False, left)


@pytest.mark.parametrize(
    ("good", "change", "rule", "names"),
    [
        (PAIR, {"conversations": None}, "missing_field", "'conversations'"),
        (PAIR, {"conversations": "q?"}, "wrong_type", "'conversations'"),
        (PAIR, {"conversations": [5]}, "wrong_type", "conversations[0]"),
        (PAIR, {"conversations": [{"from": "human"}]}, "missing_field", "'value'"),
        (PAIR, {"chosen": None}, "missing_field", "'chosen'"),
        (PAIR, {"rejected": None}, "missing_field", "'rejected'"),
        (PAIR, {"chosen": "yes"}, "wrong_type", "chosen[0] is a str"),
        (PAIR, {"chosen": [gpt("yes")]}, "wrong_type", "chosen[0] is a list"),
        (PAIR, {"chosen": human("yes")}, "no_reply", "chosen"),
        (PAIR, {"chosen": None, "rejected": None}, "missing_field", "'kto_tag'"),
        (
            PAIR,
            {"conversations": [human("q?"), {"from": "function_call", "value": "{}"}]},
            "unsupported_content",
            "conversations[1].from is 'function_call'",
        ),
        (
            PAIR,
            {"conversations": [{"from": "observation", "value": "{}"}]},
            "unsupported_content",
            "'observation'",
        ),
        (
            PAIR,
            {"conversations": [{"from": "bing", "value": "hi"}]},
            "unknown_role",
            "conversations[0].from is 'bing'",
        ),
        (PAIR, {"tools": '[{"name": "f"}]'}, "unsupported_content", "'tools'"),
        (PAIR, {"images": ["x.png"]}, "unsupported_content", "'images'"),
        (PAIR, {"system": 5}, "wrong_type", "'system'"),
        (TAGGED, {"kto_tag": None}, "missing_field", "'kto_tag'"),
        (TAGGED, {"kto_tag": "true"}, "wrong_type", "'kto_tag'"),
        (TAGGED, {"conversations": [human("q?")]}, "no_reply", "conversations"),
        (TAGGED, {"conversations": []}, "no_reply", "conversations"),
    ],
)
def test_each_fault_of_sharegpt(good: Row, change: Row, rule: str, names: str) -> None:
    assert len(read_rows("sharegpt", good)) == 1
    found, detail = refused("sharegpt", {**good, **change})
    assert (found, names in detail) == (rule, True)


@pytest.mark.parametrize(
    ("change", "rule", "names"),
    [
        ({"input": None}, "missing_field", "'input'"),
        ({"input": "q?"}, "wrong_type", "'input'"),
        ({"input": {}}, "missing_field", "'messages'"),
        ({"input": {"messages": "q?"}}, "wrong_type", "'messages'"),
        (
            {"input": {"messages": [user("q?")], "tools": [{"type": "function"}]}},
            "unsupported_content",
            "'tools'",
        ),
        ({"preferred_output": None}, "missing_field", "'preferred_output'"),
        ({"preferred_output": "yes"}, "wrong_type", "'preferred_output'"),
        ({"preferred_output": []}, "no_reply", "chosen"),
        ({"non_preferred_output": [user("no")]}, "no_reply", "rejected"),
        ({"non_preferred_output": [said("a"), said("no")]}, "prompts_differ", "turn 1"),
        (
            {"preferred_output": [{**said("yes"), "tool_calls": [{"id": "1"}]}]},
            "unsupported_content",
            "'tool_calls'",
        ),
        (
            {"preferred_output": [{"role": "assistant", "content": [{"type": "text"}]}]},
            "unsupported_content",
            "is a list",
        ),
    ],
)
def test_each_fault_of_openai(change: dict[str, Any], rule: str, names: str) -> None:
    assert one_pair("openai", OPENAI).meta == {}
    found, detail = refused("openai", {**OPENAI, **change})
    assert (found, names in detail) == (rule, True)
