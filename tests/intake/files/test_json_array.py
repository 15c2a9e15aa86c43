"""JSON arrays: cut at the commas between elements, whatever stands in them."""

import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.sources import RawRow, frame_rows
from pipeline.sources.files import json_array

BOM = b"\xef\xbb\xbf"


def framed(tmp_path: Path, data: bytes, limit: int = 1 << 26) -> list[RawRow]:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    return list(frame_rows(path, limit))


def by_hand(data: bytes) -> list[tuple[int, bytes, str | None]]:
    """(offset, element, rule), byte by byte."""
    rows: list[tuple[int, bytes, str | None]] = []
    start = at = data.index(b"[") + 1
    depth, quoted, closed = 0, False, False

    def end(rule: str | None = None) -> None:
        element = data[start:at]
        blank = len(element) - len(element.lstrip(b" \t\r\n"))
        rows.append((start + blank, element.strip(b" \t\r\n"), rule))

    while at < len(data):
        byte = data[at : at + 1]
        if quoted:
            at += byte == b"\\"
            quoted = byte != b'"'
        elif byte == b'"':
            quoted = True
        elif byte in b"[{":
            depth += 1
        elif byte in b"]}" and depth:
            depth -= 1
        elif byte == b"," and not depth:
            end()
            start = at + 1
        elif byte == b"]":
            if rows or data[start:at].strip(b" \t\r\n"):
                end()
            start, closed = at + 1, True
            break
        at += 1
    if not closed:
        at = len(data)
        end("broken_framing")
    elif rest := data[start:].lstrip(b" \t\r\n"):
        rows.append((len(data) - len(rest), rest[:8192], "broken_framing"))
    return rows


def seen(rows: list[RawRow]) -> list[tuple[int | None, bytes, str | None]]:
    assert [row.row for row in rows] == list(range(len(rows)))
    return [(row.byte_offset, row.data, row.fault and row.fault[0]) for row in rows]


FILES = {
    "plain": b'[{"a":1},{"b":[2,{"c":"]"}]}]',
    "spaced": b' \n[ {"a": 1} ,\r\n\t{"b": 2}\n]\n\n',
    "empty": b"[]",
    "empty and spaced": b"[ \n ] ",
    "strings": rb'["\"","\\","\\\"]",",",{"[":"{"}]',
    "scalars": b'[1, null,"x" , -1e5,tru]',
    "nothing between commas": b'[{"a":1},,{"b":2},]',
    "an element that is no json": b'[{"a":1},{"b" "c", \'d\'},{"e":5}]',
    "a closing brace too many": b'[{"a":1}},{"b":2}]',
    "a closing bracket too many": b'[{"a":[1]]},{"b":2}]',
    "an opening bracket too many": b'[{"a":1},{"b":[[2]},{"c":3}]',
    "a quote too many": b'[{"a":1},{"b":"x""},{"c":3}]',
    "cut off in an element": b'[{"a":1},{"b":',
    "cut off in a string": b'[{"a":1},{"b":"x\\',
    "cut off after an element": b'[{"a":1},{"b":2}',
    "cut off after a comma": b'[{"a":1},',
    "cut off at once": b"[",
    "after the end": b'[{"a":1}] {"b":2}',
    "two arrays": b'[{"a":1}]\n[{"b":2}]\n',
    "deep": b'[{"a":' + b"[" * 300 + b"]" * 300 + b'},{"b":2}]',
    "invalid utf-8": b'[{"a":"\xff\xc3"},{"\x80":2}]',
    "nul": b'[\0,{"a":1}]',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_elements_have_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    data = FILES[name]
    # The head that the format is told from is in the first block.
    monkeypatch.setattr(json_array, "_BLOCK", max(block, data.index(b"[") + 1))
    rows = framed(tmp_path, data)
    assert seen(rows) == by_hand(data)
    for row in rows:
        assert row.byte_offset is not None
        assert data[row.byte_offset :].startswith(row.data)


def test_places_in_a_small_file(tmp_path: Path) -> None:
    rows = framed(tmp_path, BOM + b'[{"a":1}, oh no,\n "\xc3\xa9,]"] x')
    assert rows == [
        RawRow(0, 4, b'{"a":1}', byte_order_mark=True),
        RawRow(1, 13, b"oh no"),
        RawRow(2, 21, b'"\xc3\xa9,]"'),
        RawRow(3, 29, b"x", ("broken_framing", "bytes after the end of the array")),
    ]


def test_a_valid_array_gives_what_a_parser_gives(tmp_path: Path) -> None:
    values = [
        {"t": "x" * n, "q": '"[{,\\' * (n % 7), "n": [[n, [[]]], {"d": {}}]} for n in range(900)
    ]
    for indent in (None, 2):
        data = json.dumps(values, indent=indent).encode()
        assert [json.loads(row.data) for row in framed(tmp_path, data)] == values


TOKENS = st.lists(
    st.sampled_from(
        [b"[", b"]", b"{", b"}", b'"', b"\\", b",", b" ", b"\n", b'"a":', b"1", b"\xff"]
    ),
    max_size=30,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(
    TOKENS | TOKENS.map(lambda t: b"".join(t[i : i + 1] * 3 for i in range(len(t)))),
    st.integers(1, 9),
)
@example(b'"\\', 1)
@example(b'{"', 2)
def test_any_bytes_are_cut_as_by_hand(inner: bytes, block: int) -> None:
    data = b"[" + inner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_BLOCK", block)
        rows = list(json_array.cut_array(io.BytesIO(data), 0, 1 << 20))
    assert seen(rows) == by_hand(data)


def test_an_element_that_is_too_long_is_not_held_and_costs_no_other(tmp_path: Path) -> None:
    data = b'[{"a":1},{"b":"' + b"x" * 5_000_000 + b'"}, {"c":3},"' + b"y" * 998 + b'"]'
    rows = framed(tmp_path, data, 1000)
    assert [(row.row, row.fault and row.fault[0]) for row in rows] == [
        (0, None), (1, "row_too_long"), (2, None), (3, None),
    ]  # fmt: skip
    assert rows[1].data == data[9 : 9 + 8192]
    assert rows[1].fault == ("row_too_long", "5,000,008 bytes, more than 1,000")
    assert data[rows[2].byte_offset :].startswith(b'{"c":3}')
    rest = framed(tmp_path, b'[{"a":1},{"b":"' + b"x" * 5_000_000, 1000)
    assert [row.fault and row.fault[0] for row in rest] == [None, "row_too_long"]


@pytest.mark.parametrize(
    "inner",
    [b"[" * 400_000, b"[]" * 200_000, b'"' * 400_001, b'"\\' * 200_000, b"{[" * 150_000,
     (b"[" * 7 + b"]" * 7) * 30_000, b"[" * 200_000 + b"]" * 200_000],
)  # fmt: skip
def test_a_hostile_array_takes_time_in_proportion_to_its_length(inner: bytes) -> None:
    started = time.process_time()
    rows = list(json_array.cut_array(io.BytesIO(b"[" + inner), 0, 1 << 26))
    assert time.process_time() - started < 5  # quadratic, it would be minutes
    assert sum(len(row.data) for row in rows) >= len(inner) // 2


def test_what_is_no_array_is_cut_into_lines(tmp_path: Path) -> None:
    assert [row.data for row in framed(tmp_path, b' {"a":1}\n[2]\n')] == [b' {"a":1}', b"[2]"]
    with pytest.raises(SourceError, match=r"rows\.json: cannot be read: it is UTF-16"):
        framed(tmp_path, '[{"a":1}]'.encode("utf-16"))
