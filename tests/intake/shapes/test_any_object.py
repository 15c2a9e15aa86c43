"""Whatever a row holds, a reader gives units or a `RowError`, and nothing else leaves it."""

import json
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published import FILES, said, user

from pipeline.sources import READERS, Candidate, Label, ReadOptions, RowError, Unit
from pipeline.sources.base import Pairing

# fmt: off
FIELDS = st.sampled_from([
    "prompt", "chosen", "rejected", "strength", "role", "content", "x", "completion", "label",
    "conversations", "messages", "from", "value", "kto_tag", "system", "instruction", "input",
    "history", "output", "preferred_output", "non_preferred_output", "context", "completions",
    "rank", "responses", "ranks", "answers", "answer", "candidates", "score", "scores", "response",
    "overall_score", "fine-grained_score", "tools", "images", "score_chosen", "score_rejected",
    "response_1", "response_2", "preference_strength", "helpfulness",
])
# fmt: on
TEXTS = ["", "user", "assistant", "human", "gpt", "\n\nHuman: a", "\n\nAssistant: b", " ", "a b"]
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([*TEXTS, "a\n<extra_id_1>Assistant\n", 10**400, 1e308, -1e308])
)  # fmt: skip
MESSY = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)
OPTIONS = st.builds(
    ReadOptions,
    pairing=st.sampled_from(get_args(Pairing)),
    min_gap=st.sampled_from([0.0, 1.0]),
    score=st.none() | FIELDS,
    columns=st.dictionaries(FIELDS, FIELDS, max_size=2),
)


def holds(shape: str, row: dict[str, object], options: ReadOptions) -> None:
    before = repr(row)
    try:
        found = READERS[shape](row, options)
    except RowError:
        return
    assert repr(row) == before, "the row was altered"
    assert found, "the row is lost"
    for unit in found:
        match unit:
            case Unit():
                texts = [unit.chosen, unit.rejected]
            case Label() | Candidate():
                texts = [unit.completion]
            case RowError():
                continue
        texts += [message[key] for message in unit.prompt for key in ("role", "content")]
        assert all(type(text) is str for text in texts)
        assert all(set(message) == {"role", "content"} for message in unit.prompt)
        json.dumps(unit.meta, allow_nan=False)


ANY = given(st.sampled_from(sorted(READERS)), st.dictionaries(FIELDS, MESSY), OPTIONS)


@settings(max_examples=300, deadline=None)
@ANY
@example(
    "conversational",
    {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")], "strength": 10**400},
    ReadOptions(),
)
@example("conversational", {"chosen": [{}], "rejected": [[]]}, ReadOptions())
def test_any_object(shape: str, row: dict[str, object], options: ReadOptions) -> None:
    holds(shape, row, options)


GOOD = [(published.shape, row) for published in FILES.values() for row in published.rows]


def with_one_value_exchanged(data: st.DataObject) -> None:
    """Nearer to what goes wrong: any value anywhere in a good row is another one."""
    shape, row = data.draw(st.sampled_from(GOOD))
    changed: Any = json.loads(json.dumps(row))
    place, key = changed, data.draw(st.sampled_from(sorted(changed)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
        )
    place[key] = data.draw(MESSY)
    holds(shape, changed, data.draw(OPTIONS))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_published_row_with_one_value_exchanged(data: st.DataObject) -> None:
    with_one_value_exchanged(data)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@ANY
def test_any_object_at_length(shape: str, row: dict[str, object], options: ReadOptions) -> None:
    holds(shape, row, options)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(st.data())
def test_a_published_row_with_one_value_exchanged_at_length(data: st.DataObject) -> None:
    with_one_value_exchanged(data)


def test_the_law_can_be_broken() -> None:
    """The control: a reader that alters its row, and one that loses it."""
    broken: list[Any] = [lambda row, options: row.clear() or [RowError("a", "")], lambda *_: []]
    for reader in broken:
        READERS["broken"] = reader
        try:
            with pytest.raises(AssertionError, match=r"altered|lost"):
                holds("broken", {"a": 1}, ReadOptions())
        finally:
            del READERS["broken"]
