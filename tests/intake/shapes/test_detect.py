"""Which shape a file has, and columns under other names."""

from pathlib import Path

import pytest
from published import Row, hh, one_pair, refused, said, user, write
from pydantic import ValidationError

from pipeline.errors import SourceError
from pipeline.plan import SourceConfig
from pipeline.sources import READERS, ReadOptions, shape_of
from pipeline.sources.readers import renamed

STANDARD: Row = {"chosen": "q? yes", "rejected": "q? no"}
HH: Row = {"chosen": hh("q?", "yes"), "rejected": hh("q?", "no")}
SCORED: Row = {"prompt": "q?", "responses": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        # Most begin with a turn; `standard` understands all of these.
        ([HH, STANDARD, HH], "hh"),
        ([HH, STANDARD], "hh"),
        ([HH, STANDARD, STANDARD], "standard"),
        # An instruction is no column like others.
        ([{**STANDARD, "instruction": "Do it."}], "alpaca"),
        # Scores go before the order; a pair before the list it was made of.
        ([SCORED], "scored"),
        ([{**SCORED, "scores": None}], "ranked"),
        ([{**SCORED, "chosen": "b", "rejected": "a"}], "standard"),
        ([{**SCORED, "chosen": [said("b")], "rejected": [said("a")]}], "conversational"),
        # A list of ties has its shape all the same.
        ([{**SCORED, "scores": [1, 1]}], "scored"),
        ([{"prompt": "q?", "response": "a", "helpfulness": 4}], "helpsteer"),
        (
            [{"prompt": "q?", "response_1": "a", "response_2": "b", "preference_strength": 0}],
            "helpsteer",
        ),
        ([{"x": 1}, {"x": 1}, HH], "hh"),
    ],
)
def test_the_precedence(rows: list[Row], shape: str, tmp_path: Path) -> None:
    assert shape_of(write(tmp_path / "file.jsonl", rows)) == shape


def test_rows_that_are_no_json_count_for_nobody(tmp_path: Path) -> None:
    path = write(tmp_path / "file.jsonl", [HH])
    path.write_bytes(b'{"a": NaN}\n' * 10 + path.read_bytes() + b"[1]\n")
    assert shape_of(path) == "hh"
    path.write_bytes(b"{\n")
    with pytest.raises(SourceError, match="as JSON: invalid_json"):
        shape_of(path)


def test_what_each_shape_misses_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "file.jsonl", [{"question": "q?", "good": "yes", "bad": "no"}])
    with pytest.raises(SourceError) as caught:
        shape_of(path)
    assert all(f"as {shape}: missing_field" in str(caught.value) for shape in READERS)
    named = ReadOptions(columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert shape_of(path, named) == "standard"


def test_columns_are_renamed_before_reading() -> None:
    row = {"question": "q?", "good": "yes", "bad": "no", "id": 3}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    unit = one_pair("standard", row, columns=columns)
    assert (unit.prompt, unit.chosen, unit.rejected) == ([user("q?")], "yes", "no")
    assert unit.meta == {"id": 3}
    assert refused("standard", row, columns={"chosen": "best"})[0] == "missing_field"
    # The control: without the names nothing is found.
    assert refused("standard", row)[0] == "missing_field"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, {"a": 1, "b": 2, "c": 3}),
        ({"d": "a"}, {"d": 1, "b": 2, "c": 3}),
        ({"a": "b", "b": "a"}, {"a": 2, "b": 1, "c": 3}),
        ({"a": "b"}, {"a": 2, "a_column": 1, "c": 3}),
        ({"a": "b", "b": "c"}, {"a": 2, "b": 3, "a_column": 1}),
        ({"a": "b", "b": "c", "c": "b"}, {"a": 2, "b": 3, "c": 2, "a_column": 1}),
        ({"a": "x"}, {"a_column": 1, "b": 2, "c": 3}),
    ],
)
def test_no_column_is_lost(columns: dict[str, str], expected: Row) -> None:
    row: Row = {"a": 1, "b": 2, "c": 3}
    assert renamed(row, columns) == expected
    assert row == {"a": 1, "b": 2, "c": 3}


def test_every_shape_can_be_named_in_a_plan() -> None:
    assert [SourceConfig(path="x", shape=shape).shape for shape in READERS] == list(READERS)
    with pytest.raises(ValidationError, match="'jsonl' is not one of"):
        SourceConfig(path="x", shape="jsonl")


def test_a_displaced_column_displaces_nothing() -> None:
    row: Row = {"a": 1, "b": 2, "a_column": 3}
    assert renamed(row, {"a": "b"}) == {"a": 2, "a_column": 3, "a_column_column": 1}
