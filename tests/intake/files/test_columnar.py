"""Parquet and Arrow: rows as JSON, damage found, claims not believed."""

import datetime
import decimal
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.sources import RawRow, RowError, frame_rows, parse_row


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def arrow(table: pa.Table, new: Callable[..., Any] = pa.ipc.new_file, **options: Any) -> bytes:
    out = io.BytesIO()
    with new(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=700)
    return out.getvalue()


def stream(table: pa.Table, **options: Any) -> bytes:
    return arrow(table, pa.ipc.new_stream, **options)


def packed(table: pa.Table) -> bytes:
    return stream(table, compression="zstd")


WAYS = {"parquet": parquet, "arrow file": arrow, "arrow stream": stream, "packed stream": packed}


def framed(tmp_path: Path, data: bytes, limit: int = 1 << 26) -> list[RawRow]:
    path = tmp_path / "rows"
    path.write_bytes(data)
    return list(frame_rows(path, limit))


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_what_arrow_says_they_are(tmp_path: Path, way: str) -> None:
    rows = [
        {
            "prompt": None
            if i % 7 == 0
            else [{"role": "user", "content": f'{i} "é\n😀'}] * (i % 3),
            "chosen": f"answer {i}" if i % 5 else None,
            "score": i / 7,
            "n": i - 1000,
            "ok": i % 2 == 0,
            "nested": {"a": {"b": [[i], [], None]}, "c": None},
        }
        for i in range(2500)
    ]
    found = framed(tmp_path, WAYS[way](pa.Table.from_pylist(rows)))
    assert [json.loads(row.data) for row in found] == rows
    assert [(row.row, row.byte_offset) for row in found] == [(i, None) for i in range(2500)]


UTC = datetime.UTC
TYPES: list[tuple[pa.Array, list[object]]] = [
    (pa.array([math.nan, math.inf, -math.inf, 0.1]), ["nan_literal"] * 3 + [0.1]),
    (pa.array([0.5, None], pa.float16()), [0.5, None]),
    (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
    (pa.array([decimal.Decimal("1.50"), None]), [1.5, None]),
    (pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5, 6), None]),
     ["2024-01-02T03:04:05.000006", None]),
    (pa.array([datetime.datetime(2024, 1, 2, tzinfo=UTC)], pa.timestamp("ms", "Europe/Paris")),
     ["2024-01-02T00:00:00.000Z"]),
    (pa.array([datetime.date(2024, 1, 2)]), ["2024-01-02"]),
    (pa.array([datetime.time(1, 2, 3)]), ["01:02:03.000000"]),
    (pa.array([datetime.timedelta(1)]), [{"unsupported": "duration[us]"}]),
    (pa.array([b"\xff", None]), [{"unsupported": "binary"}, None]),
    (pa.array([{"bytes": b"png", "path": "a.png"}]),
     [{"bytes": {"unsupported": "binary"}, "path": "a.png"}]),
    (pa.array(["a", None, "b", "a"]).dictionary_encode(), ["a", None, "b", "a"]),
    (pa.array([None, None]), [None, None]),
    (pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int8())),
     [[{"key": "k", "value": 1}], None, []]),
    (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), [[1, 2], None]),
    (pa.array([["x"]], pa.large_list(pa.large_string())), [["x"]]),
    (pa.array(["long enough to be elsewhere", "x", None], pa.string_view()),
     ["long enough to be elsewhere", "x", None]),
    (pa.array([{}, None], pa.struct([])), [{}, None]),
]  # fmt: skip


@pytest.mark.parametrize("way", ["parquet", "arrow stream"])
@pytest.mark.parametrize(("array", "expected"), TYPES, ids=[str(a.type) for a, _ in TYPES])
def test_every_type(tmp_path: Path, way: str, array: pa.Array, expected: list[object]) -> None:
    if way == "parquet" and array.type == pa.struct([]):
        return  # which Parquet cannot write
    table = pa.table({"x": array})
    found = []
    for row in framed(tmp_path, WAYS[way](table)):
        try:
            found.append(parse_row(row)["x"])
        except RowError as error:
            found.append(error.rule)
    assert found == expected


def test_what_polars_writes(tmp_path: Path) -> None:
    frame = pl.DataFrame({"chosen": ["yes, at some length", "no"], "m": [[{"role": "user"}], []]})
    for write in (frame.write_parquet, frame.write_ipc, frame.write_ipc_stream):
        write(tmp_path / "rows")
        assert [json.loads(row.data) for row in frame_rows(tmp_path / "rows")] == frame.to_dicts()


def test_a_column_twice_is_a_duplicate_key(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    (row,) = framed(tmp_path, stream(table))
    with pytest.raises(RowError, match="duplicate_key"):
        parse_row(row)


def broken_text() -> pa.Table:
    raw = pa.array([b"good", b"bad \xff", b"good too"])
    return pa.table({"chosen": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})


def test_invalid_utf8_in_parquet_costs_its_row_and_in_arrow_the_file(tmp_path: Path) -> None:
    rows = framed(tmp_path, parquet(broken_text()))
    assert parse_row(rows[0]) == {"chosen": "good"}
    with pytest.raises(RowError, match="invalid_utf8"):
        parse_row(rows[1])
    assert parse_row(rows[2]) == {"chosen": "good too"}
    with pytest.raises(SourceError, match="UTF8"):
        framed(tmp_path, stream(broken_text()))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_is_too_long_costs_no_other(tmp_path: Path, way: str) -> None:
    texts = ["a", "x" * 5000, "b", "y" * 5000, "c"]
    rows = framed(tmp_path, WAYS[way](pa.table({"chosen": texts, "i": range(5)})), 1000)
    assert [row.fault and row.fault[0] for row in rows] == [
        None, "row_too_long", None, "row_too_long", None,
    ]  # fmt: skip
    assert [json.loads(row.data)["i"] for row in rows if not row.fault] == [0, 2, 4]


def test_many_rows_with_one_long_text_are_held_once(tmp_path: Path) -> None:
    import tracemalloc

    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(500, np.int32)), ["x" * 1_000_000])
    for data in (parquet(pa.table({"t": texts})), stream(pa.table({"t": texts}))):
        (tmp_path / "rows").write_bytes(data)
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        rows = frame_rows(tmp_path / "rows", 8_000_000)
        assert sum(len(row.data) for row in rows) > 500_000_000
        assert tracemalloc.get_traced_memory()[1] < 64_000_000
        assert pa.total_allocated_bytes() - before < 64_000_000
        tracemalloc.stop()


# Damage


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path, way: str) -> None:
    data = WAYS[way](pa.table({"chosen": [f"answer {i}" for i in range(1500)]}))
    for length in (4, 5, 20, len(data) // 2, len(data) - 300, len(data) - 9, len(data) - 1):
        if way.endswith("stream") and length > len(data) - 9:
            continue  # its end mark is not required
        with pytest.raises(SourceError, match="cannot be read"):
            framed(tmp_path, data[:length])


def test_a_flipped_bit_is_found_by_the_page_checksum(tmp_path: Path) -> None:
    table = pa.table({"chosen": [f"answer {i * 7919 % 1009}" for i in range(1500)]})
    clean = parquet(table, use_dictionary=False, compression="none", write_page_checksum=True)
    for place in (clean.index(b"answer 7", 200), len(clean) // 3, len(clean) // 2):
        data = bytearray(clean)
        data[place] ^= 1
        with pytest.raises(SourceError, match=r"cannot be read: .*CRC"):
            framed(tmp_path, bytes(data))
    # The control: without checksums nobody can tell.
    unchecked = bytearray(parquet(table, use_dictionary=False, compression="none"))
    unchecked[unchecked.index(b"answer 7", 200)] ^= 1
    rows = framed(tmp_path, bytes(unchecked))
    assert [json.loads(row.data) for row in rows] != table.to_pylist()


# Claims


def test_a_parquet_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    zeros = pa.table({"x": np.zeros(50_000_000)})  # 400 MB
    data = parquet(zeros, use_dictionary=False, compression="zstd", row_group_size=50_000_000)
    with pytest.raises(SourceError, match=r"bytes in a file of .* are not believed"):
        framed(tmp_path, data)
    rows = parquet(pa.table({"x": pa.nulls(50_000_000, pa.int8())}))
    with pytest.raises(SourceError, match=r"50,000,000 values in a file of .* are not believed"):
        framed(tmp_path, rows)
    few = pa.table({"x": pa.nulls(50_000, pa.int8())})
    assert len(framed(tmp_path, parquet(few))) == 50_000


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_batch_that_claims_too_much_is_refused(
    tmp_path: Path, new: Callable[..., Any]
) -> None:
    def write(array: pa.Array, **options: Any) -> bytes:
        batch = pa.record_batch({"x": array})
        out = io.BytesIO()
        with new(out, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_batch(batch)
        return out.getvalue()

    zeros = pa.array(np.zeros(80_000_000))
    indices = pa.array([0], pa.int32())
    bomb = write(zeros, compression="zstd")
    of_texts = write(pa.DictionaryArray.from_arrays(indices, zeros), compression="lz4")
    before = pa.total_allocated_bytes()
    for data in (bomb, of_texts):
        with pytest.raises(SourceError, match="unpacks to 640,000,000 bytes"):
            framed(tmp_path, data)
    assert pa.total_allocated_bytes() == before
    nothing = pa.Array.from_buffers(pa.null(), 1 << 30, [None])
    with pytest.raises(SourceError, match="1,073,741,824 values in 0 bytes are not believed"):
        framed(tmp_path, write(nothing))
    assert len(framed(tmp_path, write(nothing[:5000]))) == 5000
