"""Any bytes under any name: rows or a `SourceError`, nothing else, and nothing is dropped."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.sources import RawRow, RowError, frame_rows, parse_row

LIMIT = 2000
ROWS = [
    {
        "prompt": None,
        "chosen": [{"role": "user", "content": f'é "{i}"\n' * (i % 5)}],
        "score": i / 3,
    }
    for i in range(40)
]
TABLE = pa.Table.from_pylist([{**row, "kind": "abc"[i % 3]} for i, row in enumerate(ROWS)])


def _parquet(**options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(TABLE, out, **options)
    return out.getvalue()


def _arrow(new: Callable[..., object], compression: str | None) -> bytes:
    out = io.BytesIO()
    encoded = TABLE.set_column(3, "kind", TABLE["kind"].dictionary_encode())
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(out, encoded.schema, options=options) as writer:  # type: ignore[attr-defined]
        writer.write_table(encoded)
    return out.getvalue()


LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
FLAT = pl.DataFrame({"chosen": [f'"{i}",\n' for i in range(40)], "score": range(40)})
SEEDS: dict[str, list[bytes]] = {
    "rows.jsonl": [LINES, b"\xef\xbb\xbf" + LINES[:200]],
    "rows.json": [json.dumps(ROWS[:9]).encode(), json.dumps(ROWS[:3], indent=2).encode()],
    "rows.csv": [FLAT.write_csv().encode(), b'a,b\r\n"x\ny",1\r\n'],
    "rows.parquet": [_parquet(), _parquet(compression="none", use_dictionary=False),
                     _parquet(data_page_version="2.0", compression="zstd"),
                     _parquet(write_page_checksum=True)],
    "rows.arrow": [_arrow(pa.ipc.new_file, None), _arrow(pa.ipc.new_stream, None),
                   _arrow(pa.ipc.new_stream, "zstd"), _arrow(pa.ipc.new_file, "lz4")],
    "rows.jsonl.gz": [gzip.compress(LINES), gzip.compress(LINES) * 2],
    "rows.csv.zst": [zstd.compress(FLAT.write_csv().encode())],
}  # fmt: skip

PIECES = st.binary(max_size=8) | st.sampled_from(
    [b"\n", b"\r\n", b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"\0" * 8, b"\xff" * 4, b"\xff\x7f",
     b"\xef\xbb\xbf", b"\xfe\xff", b"x" * 3000, b"PAR1", b"ARROW1", b"\x1f\x8b", b"NaN"]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A file of this kind with pieces changed, put in, cut out or cut off; or anything."""
    if draw(st.integers(0, 9)) == 0:
        return b"".join(draw(st.lists(PIECES, max_size=12)))
    data = draw(st.sampled_from(SEEDS[name]))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(PIECES)
        cut = draw(st.sampled_from([0, len(piece), 1, 8, 1 << 30]))
        data = data[:at] + piece + data[at + cut :]
    return data


def framed(folder: Path, name: str, data: bytes) -> list[RawRow] | None:
    path = folder / name
    path.write_bytes(data)
    try:
        rows = list(frame_rows(path, LIMIT))
    except SourceError as error:
        if str(path) not in str(error):
            raise
        return None
    for row in rows:
        assert len(row.data) <= max(LIMIT, 8192)
        try:
            parse_row(row)
        except RowError as error:
            error.detail.encode()
    places = [row.byte_offset for row in rows if row.byte_offset is not None]
    assert places == sorted(places)
    assert [row.row for row in rows] == sorted({row.row for row in rows})
    return rows


def check(folder: Path, name: str, data: bytes) -> None:
    rows = framed(folder, name, data)
    if rows is None or name not in ("rows.jsonl", "rows.json", "rows.csv"):
        return
    if data[:2] == b"\x1f\x8b":
        return
    for row in rows:
        assert row.byte_offset is not None
        if name != "rows.csv":
            assert data[row.byte_offset :].startswith(row.data)
    if name == "rows.jsonl":
        # Every byte that is not blank is in a row that was held, or in one that was too long.
        held = [row.data for row in rows if row.fault is None]
        text = data.removeprefix(b"\xef\xbb\xbf")
        lines = [line for line in text.split(b"\n") if line.strip()]
        assert len(lines) == len(rows)
        assert held == [line.rstrip(b"\r") for line in lines if len(line) <= LIMIT]


SOME = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", SEEDS)
def test_some_hostile_files(tmp_path: Path, name: str) -> None:
    SOME(given(damaged(name))(lambda data: check(tmp_path, name, data)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_many_hostile_files(tmp_path: Path, name: str) -> None:
    MANY(given(damaged(name))(lambda data: check(tmp_path, name, data)))()


@pytest.mark.parametrize("name", SEEDS)
def test_the_undamaged_files_are_read(tmp_path: Path, name: str) -> None:
    for data in SEEDS[name]:
        rows = framed(tmp_path, name, data)
        assert rows
        assert all(row.fault is None for row in rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_memory_is_bounded_whatever_the_length(tmp_path: Path, name: str) -> None:
    """30 MB of rows, and 30 MB in one row, in less than 8 MB."""
    row = b'"' + b"x" * 997 + b'"'
    for rows in ([row] * 30_000, [b'"' + b"x" * 30_000_000 + b'"']):
        head, between, tail = {
            "rows.json": (b"[", b",", b"]"),
            "rows.csv": (b"chosen\n", b"\n", b""),
        }.get(name, (b"", b"\n", b""))
        (tmp_path / name).write_bytes(head + between.join(rows) + tail)
        tracemalloc.start()
        assert sum(1 for _ in frame_rows(tmp_path / name, 1 << 20)) == len(rows)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
        tracemalloc.stop()
