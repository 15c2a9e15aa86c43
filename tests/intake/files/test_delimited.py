"""CSV and TSV: RFC 4180, each record a JSON object, nothing guessed that could be text."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.sources import RawRow, RowError, frame_rows, parse_row
from pipeline.sources.files.delimited import cut_records


def framed(
    tmp_path: Path, data: bytes, name: str = "rows.csv", limit: int = 1 << 26
) -> list[RawRow]:
    path = tmp_path / name
    path.write_bytes(data)
    return list(frame_rows(path, limit))


def values(rows: list[RawRow]) -> list[object]:
    return [parse_row(row) for row in rows]


def rule(row: RawRow) -> str:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    return caught.value.rule


def test_records_and_their_places(tmp_path: Path) -> None:
    data = (
        b"\xef\xbb\xbfprompt,chosen,score\r\n"
        b'"a, ""b""\n\nc",yes,1\r\n'
        b"\r\n"
        b'\xc3\xa9,"",\r\n'
        b"last,no,-0.5"
    )
    rows = framed(tmp_path, data)
    assert values(rows) == [
        {"prompt": 'a, "b"\n\nc', "chosen": "yes", "score": 1},
        {"prompt": "é", "chosen": "", "score": None},
        {"prompt": "last", "chosen": "no", "score": -0.5},
    ]
    assert [row.row for row in rows] == [0, 1, 2]
    assert [row.byte_offset for row in rows] == [
        data.index(b'"a,'), data.index(b"\xc3"), data.index(b"last"),
    ]  # fmt: skip
    assert [row.byte_order_mark for row in rows] == [True, False, False]
    tabbed = framed(tmp_path, b'prompt\tchosen\n"a\tb"\tc,d\n', "rows.tsv")
    assert values(tabbed) == [{"prompt": "a\tb", "chosen": "c,d"}]


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("score", "1", 1), ("score", "1.50", 1.5), ("score", "-2e3", -2000.0),
        ("score", "", None), ("label", "True", True), ("label", "false", False),
        ("x", "null", None), ("id", "007", "007"), ("id", "1_000", "1_000"), ("id", "+1", "+1"),
        ("x", " 1", " 1"), ("x", "None", "None"), ("score", "nan", "nan"), ("x", "٣", "٣"),
        # What somebody wrote stays what it is.
        ("chosen", "42", "42"), ("rejected", "true", "true"), ("Response_2", "1", "1"),
        ("prompt", "", ""), ("answers", "null", "null"), ("completion_a", "3", "3"),
        ("chosen_score", "4", 4), ("response_length", "5", 5),
        ("chosen", '[{"role":"user","content":"a"}]', [{"role": "user", "content": "a"}]),
        ("conversations", '[{"from":"human","value":"a"}]', [{"from": "human", "value": "a"}]),
        ("chosen", "[]", "[]"), ("chosen", "[1]", "[1]"), ("chosen", "[sic]", "[sic]"),
        ("chosen", "[{'role': 'user'}]", "[{'role': 'user'}]"),
        ("x", "[" * 9999 + "]", "[" * 9999 + "]"),
        ("chosen", '[{"role":"user"},{"x":1}]', '[{"role":"user"},{"x":1}]'),
    ],
)  # fmt: skip
def test_what_a_cell_is(tmp_path: Path, column: str, cell: str, value: object) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([[column, "z"], [cell, "."]])
    assert values(framed(tmp_path, text.getvalue().encode())) == [{column: value, "z": "."}]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a,b\n1,2,3\n", "invalid_csv"),
        (b"a,b\n1\n", "invalid_csv"),
        (b'a,b\n"x"y,2\n', "invalid_csv"),
        (b'a,b\n1,"never closed\n2,3\n', "invalid_csv"),
        (b"a,b\n1,2\r3\n", "invalid_csv"),
        (b"a,a\n1,2\n", "duplicate_key"),
        (b"chosen,b\n\xff,2\n", "invalid_utf8"),
        (b"chosen,b\nx\xed\xa0\x80,2\n", "invalid_utf8"),
        (b"\xff,b\n1,2\n", "invalid_utf8"),
        (b"a,score\n1,1e400\n", "nan_literal"),
        (b"a,score\n1," + b"9" * 5000 + b"\n", "invalid_json"),
        (b'a,chosen\n1,"[{""role"":""u"",""role"":""v""}]"\n', "duplicate_key"),
        (b'a,chosen\n1,"[{""role"":NaN}]"\n', "nan_literal"),
        (b'a,chosen\n1,"[{""role"":""\\ud800""}]"\n', "lone_surrogate"),
    ],
)
def test_a_bad_record_has_a_rule(tmp_path: Path, data: bytes, expected: str) -> None:
    (row,) = framed(tmp_path, data)
    assert rule(row) == expected
    assert row.byte_offset == data.index(b"\n") + 1


def test_a_bad_record_costs_no_other(tmp_path: Path) -> None:
    good = b'x,"1\n2"\n'
    rows = framed(tmp_path, b"a,chosen\n" + good + b'"q"q,1\n' + good + b"1,2,3\n" + good)
    assert [row.fault is None for row in rows] == [True, False, True, False, True]
    assert [v for row in rows if not row.fault for v in (parse_row(row)["chosen"],)] == ["1\n2"] * 3
    assert rows[1].data == b'"q"q,1'
    assert rows[3].data == b"1,2,3"
    assert rows[3].fault == ("invalid_csv", "3 cells in 2 columns")


def test_cells_of_any_length_up_to_the_limit(tmp_path: Path) -> None:
    long = "x" * 300_000  # beyond the csv module's own limit
    data = f'a,chosen\n1,{long}\n2,"{long}\n{long}, {long}"\n3,y\n'.encode()
    assert [row["chosen"] for row in map(parse_row, framed(tmp_path, data))] == [
        long, f"{long}\n{long}, {long}", "y",
    ]  # fmt: skip
    rows = framed(tmp_path, data, limit=400_000)
    assert [row.fault and row.fault[0] for row in rows] == [None, "row_too_long", None]
    assert rows[1].data == data[300_012 : 300_012 + 8192]
    assert rows[1].fault == ("row_too_long", "900,008 bytes, more than 400,000")
    assert parse_row(rows[2]) == {"a": 3, "chosen": "y"}
    rows = framed(tmp_path, data, limit=1000)
    assert [row.fault and row.fault[0] for row in rows] == ["row_too_long", "row_too_long", None]


@pytest.mark.parametrize("head", [b'"a\n1,2\n', b'"a"b,c\n', b"a\rb\n", b"a" * 2000 + b"\n"])
def test_column_names_that_cannot_be_read_are_an_error(tmp_path: Path, head: bytes) -> None:
    with pytest.raises(SourceError, match=r"rows\.csv: cannot be read: its column names: "):
        framed(tmp_path, head, limit=1000)


def test_no_record_is_no_row(tmp_path: Path) -> None:
    for data in (b"", b"\n", b"a,b", b"a,b\n\n\n"):
        assert framed(tmp_path, data) == []


CELLS = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ['"', "\n", "\r\n", ","]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=6))
def test_what_the_csv_module_writes_is_read(cells: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("chosen", "rejected"), *cells])
    rows = list(cut_records(io.BytesIO(text.getvalue().encode()), 0, 1 << 20, ","))
    assert [json.loads(row.data) for row in rows] == [
        {"chosen": a, "rejected": b} for a, b in cells
    ]
