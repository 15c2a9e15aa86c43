"""Rows sorted and made distinct by their id, without holding them all in memory."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import polars as pl
import pyarrow as pa

SEQUENCE_ORDER = ("sequence_id", "truncated")
"""Of equal sequences, one that was not cut to be so is kept, whichever came first."""

_N_BUCKETS = 64
_HELD_BYTES = 128 << 20


class SortedRows:
    """Frames are added in any order; `pieces` gives their rows back, sorted by an id column.

    Up to some 128 MB are held in memory; beyond, rows wait in unnamed files (nothing is left if
    the process dies), one for each range of ids, and one range at a time is read back.
    """

    def __init__(
        self, order: Sequence[str], schema: pl.Schema, directory: Path, stack: ExitStack
    ) -> None:
        self._order = order
        self._schema = schema
        self._directory = directory
        self._stack = stack
        self._held: list[pl.DataFrame] = []
        self._held_bytes = 0
        self._buckets: list[tuple[IO[bytes], pa.RecordBatchStreamWriter] | None] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Take some rows."""
        self._held.append(frame)
        self._held_bytes += int(frame.estimated_size())
        if self._held_bytes > _HELD_BYTES:
            self._spill()

    def pieces(self) -> Iterator[pl.DataFrame]:
        """All rows, once, sorted and distinct; at least one piece, maybe an empty one."""
        if not self._buckets:
            yield self._distinct(self._held)
            return
        self._spill()
        for bucket in self._buckets:
            if bucket is None:
                continue
            file, writer = bucket
            writer.close()
            file.seek(0)
            with pa.ipc.open_stream(file) as reader:
                frame = pl.from_arrow(reader.read_all(), schema=self._schema)
            assert isinstance(frame, pl.DataFrame)
            yield self._distinct([frame])

    def _distinct(self, frames: list[pl.DataFrame]) -> pl.DataFrame:
        rows = pl.concat([pl.DataFrame(schema=self._schema), *frames], rechunk=False)
        return distinct(rows, self._order)

    def _spill(self) -> None:
        rows = pl.concat([pl.DataFrame(schema=self._schema), *self._held])
        self._held, self._held_bytes = [], 0
        self._buckets = self._buckets or [None] * _N_BUCKETS
        # Ids are hex digits of a hash, so ranges of their first two are of about equal size.
        place = pl.col(self._order[0]).str.head(2).str.to_integer(base=16) // (256 // _N_BUCKETS)
        parts = rows.with_columns(place.alias("bucket")).partition_by(
            "bucket", maintain_order=True, include_key=False, as_dict=True
        )
        for (number,), part in parts.items():
            table = part.to_arrow()
            bucket = self._buckets[number]
            if bucket is None:
                file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - on the stack
                self._stack.enter_context(file)
                bucket = self._buckets[number] = (file, pa.ipc.new_stream(file, table.schema))
            bucket[1].write_table(table)


def distinct(rows: pl.DataFrame, order: Sequence[str]) -> pl.DataFrame:
    """Rows sorted by the columns of `order`, and of those with one id (the first) the first."""
    return rows.sort(order, maintain_order=True).unique(order[0], keep="first", maintain_order=True)


@contextmanager
def sorted_rows(
    schema: pl.Schema, directory: Path, order: Sequence[str] = SEQUENCE_ORDER
) -> Iterator[SortedRows]:
    """A place for rows to be sorted in, which is gone afterwards.

    Args:
        order: the id's column (ids are hex digits), and those that say which of two rows is kept.
        schema: the rows'.
        directory: where rows may wait; it is made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        yield SortedRows(order, schema, directory, stack)
