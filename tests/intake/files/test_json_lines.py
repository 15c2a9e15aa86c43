"""JSON lines: every byte has its place, and one bad line costs one row."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.sources import RawRow, frame_rows


def framed(tmp_path: Path, data: bytes) -> list[RawRow]:
    path = tmp_path / "rows"
    path.write_bytes(data)
    return list(frame_rows(path))


def lines_by_hand(data: bytes) -> list[tuple[int, int, bytes]]:
    """Rows found by searching for newlines, byte by byte."""
    rows, start, number = [], 0, 0
    for end in [i for i, byte in enumerate(data) if byte == 0x0A] + [len(data)]:
        line = data[start:end]
        if number == 0 and line[:3] == b"\xef\xbb\xbf":
            start, line = 3, line[3:]
        while line[-1:] == b"\r":
            line = line[:-1]
        if line.strip(b" \t\n\r"):
            rows.append((number, start, line))
        start, number = end + 1, number + 1
    return rows


FILES = {
    "plain": b'{"a":1}\n{"b":2}\n',
    "no final newline": b'{"a":1}\n{"b":2}',
    "crlf": b'{"a":1}\r\n{"b":2}\r\n{"c":3}',
    "byte-order mark": b'\xef\xbb\xbf{"a":1}\n\xef\xbb\xbf{"b":2}\n',
    "byte-order mark alone": b"\xef\xbb\xbf\n{}",
    "lines that are blank but not to JSON": b'\x0b\n{"a":1}\n \x0c\n',
    "blank lines": b'\n\n{"a":1}\n \t\r\n{"b":2}\n\n',
    "multi-byte": '{"é":"😀"}\n{"a":"\u2028\x85"}\n'.encode(),
    "carriage return inside": b'{"a":\r1}\n',
    "invalid utf-8": b"\xff\xfd\n\x80\n",
    "nul": b"\0\n\0\0",
    "empty": b"",
    "newline alone": b"\n",
    "a megabyte": b'{"a":"' + b"x" * (1 << 20) + b'"}\n{}\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_rows_have_their_place(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    data = FILES[name]
    rows = framed(tmp_path, pack(data))
    assert [(row.row, row.byte_offset, row.data) for row in rows] == lines_by_hand(data)
    for row in rows:
        assert data[row.byte_offset :].startswith(row.data)
    marked = data.startswith(b"\xef\xbb\xbf")
    assert [row.byte_order_mark for row in rows] == [marked and row is rows[0] for row in rows]


def test_places_in_a_small_file(tmp_path: Path) -> None:
    rows = framed(tmp_path, b'\xef\xbb\xbf{"a":1}\r\n\n{"\xc3\xa9":2}\n[3]')
    assert rows == [
        RawRow(0, 3, b'{"a":1}', byte_order_mark=True),
        RawRow(2, 13, b'{"\xc3\xa9":2}'),
        RawRow(3, 22, b"[3]"),
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"\n", b"\r", b"{", b" ", b"\xef\xbb\xbf", b"\xc3\xa9", b"\0"])))
def test_any_bytes_are_framed_as_by_hand(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    data = b"".join(parts)
    rows = framed(tmp_path_factory.getbasetemp(), data)
    assert [(row.row, row.byte_offset, row.data) for row in rows] == lines_by_hand(data)


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    rows = framed(tmp_path, gzip.compress(b"{}\n[") + gzip.compress(b"]\n"))
    assert [(row.byte_offset, row.data) for row in rows] == [(0, b"{}"), (3, b"[]")]


PACKED = gzip.compress(b"".join(b'{"n":%d}\n' % i for i in range(5000)))


@pytest.mark.parametrize(
    "data",
    [
        PACKED[: len(PACKED) // 2],
        PACKED[:-1],
        PACKED[:2],
        PACKED[:100] + b"\xff\x00\xff\x00" + PACKED[104:],
        PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:],  # the checksum
        PACKED + b"junk",
    ],
)
def test_broken_compression_is_an_error_and_names_the_file(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SourceError, match=f"{tmp_path / 'rows'}: cannot be read"):
        framed(tmp_path, data)


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SourceError, match=f"{path}: cannot be read"):
            list(frame_rows(path))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_line_that_is_too_long_is_not_held_and_costs_no_other(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    data = b'{"a":1}\n' + b"x" * 5_000_000 + b"\r\n\n" + b"y" * 1000 + b"\n" + b"z" * 1001 + b"\n2"
    path = tmp_path / "rows"
    path.write_bytes(pack(data))
    rows = list(frame_rows(path, limit=1000))
    assert [(row.row, row.byte_offset, row.fault) for row in rows] == [
        (0, 0, None),
        (1, 8, ("row_too_long", "5,000,002 bytes, more than 1,000")),
        (3, 5_000_011, None),
        (4, 5_001_012, ("row_too_long", "1,002 bytes, more than 1,000")),
        (5, 5_002_014, None),
    ]
    assert rows[1].data == b"x" * 1001
    assert len(rows[2].data) == 1000
