"""Intermediate frames on disk, so that memory does not grow with the input.

A frame is cut into parts, a record batch each, and a part can be read alone. Units are cut by the
first byte of their prompt's id: all units of a prompt are in one part, and the parts in their order
are the prompts in theirs.
"""

from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pyarrow as pa

BUCKETS = 128
"""How many parts units are cut into: of 10 million pairs of 1 KB, some 80 MB each."""

_BYTES_PER_BUCKET = 256 // BUCKETS
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def bucket_of(prompt_id: str = "prompt_id") -> pl.Expr:
    """The bucket of a prompt, by the column of its id."""
    first = pl.col(prompt_id).str.slice(0, 2).str.to_integer(base=16, dtype=pl.Int64)
    return first // _BYTES_PER_BUCKET


def write_parts(path: Path, frame: pl.DataFrame, part: str) -> dict[int, int]:
    """Write a frame cut by its integer column `part`; says which record batch each part is."""
    ordered = frame.sort(part, maintain_order=True)
    lengths = ordered.group_by(part, maintain_order=True).len()
    table = ordered.drop(part).to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
    batches: dict[int, int] = {}
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=_OPTIONS) as writer,
    ):
        start = 0
        for value, length in lengths.iter_rows():
            writer.write_table(table.slice(start, length))
            batches[value] = len(batches)
            start += length
    return batches


def read_parts(parts: Iterable[tuple[Path, int]], schema: pl.Schema | None) -> pl.DataFrame:
    """Parts, each a file and a record batch of it, one after the other; the schema's columns."""
    found = []
    for path, batch in parts:
        with pa.memory_map(str(path)) as source:
            frame = pl.from_arrow(_reader(source, schema).get_batch(batch))
        assert isinstance(frame, pl.DataFrame)
        found.append(frame if schema is None else frame.cast(schema))
    return pl.concat(found) if found else pl.DataFrame(schema=schema)


def _reader(source: pa.NativeFile, schema: pl.Schema | None) -> pa.ipc.RecordBatchFileReader:
    reader = pa.ipc.open_file(source)
    if schema is None:
        return reader
    wanted = [i for i, name in enumerate(reader.schema.names) if name in schema]
    source.seek(0)
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted))
