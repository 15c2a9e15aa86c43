"""Tables as Parquet files: validated before they are written, verified before they are parsed."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import blake3
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.store.files import file_bytes, verify
from schemas import Table, require_validation

_TABLE_KEY = b"logratio.table"
_GROUP_ROWS = 1 << 16


def checked(name: str, frame: pl.DataFrame, model: type[Table]) -> pl.DataFrame:
    """`frame`, validated; `ge=0` alone would let NaN through, since Polars ranks it highest."""
    floats = [c for c, dtype in frame.schema.items() if dtype.is_float()]
    lists = [c for c, t in frame.schema.items() if t in (pl.List(pl.Float32),)]
    bad = frame.select(
        *[(~pl.col(c).is_finite()).sum().alias(c) for c in floats],
        *[(~pl.col(c).explode().is_finite()).sum().alias(c) for c in lists],
    )
    for column, count in bad.to_dicts()[0].items() if bad.width else ():
        if count:
            raise StoreError(f"table '{name}': {count} values of '{column}' are NaN or infinite")
    require_validation()
    validated: pl.DataFrame = model.validate(frame, lazy=True)
    return validated


def write_parquet(sink: BinaryIO, frame: pl.DataFrame, table: str) -> None:
    """Write a frame as Parquet with the table's name in the footer (catches swapped files)."""
    write_pieces(sink, [frame], frame.schema, table)


def write_pieces(
    sink: BinaryIO, pieces: Iterable[pl.DataFrame], columns: pl.Schema, table: str
) -> int:
    """Write frames as one table in row groups of one size; the number of rows."""
    schema = pl.DataFrame(schema=columns).to_arrow().schema
    schema = schema.with_metadata({**(schema.metadata or {}), _TABLE_KEY: table.encode()})
    waiting, n_waiting, n_rows = [], 0, 0
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for piece in pieces:
            # As Arrow at once: a Polars frame may keep much larger text alive that it is a part of.
            waiting.append(_arrow(piece, schema))
            n_waiting += piece.height
            n_rows += piece.height
            while n_waiting >= _GROUP_ROWS:
                together = pa.concat_tables(waiting)
                writer.write_table(together[:_GROUP_ROWS].combine_chunks(), _GROUP_ROWS)
                waiting, n_waiting = [together[_GROUP_ROWS:]], n_waiting - _GROUP_ROWS
        if n_waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), _GROUP_ROWS)
    return n_rows


def _arrow(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)


def read_snapshot(path: Path, table: str, digest: str | None = None) -> pl.DataFrame:
    """Read a table's file after checking its hash (by default, its name) and the table it is.

    Raises:
        StoreError: missing, damaged, or another table's file.
    """
    verify_table(path, table, digest)
    return pl.read_parquet(path, glob=False, hive_partitioning=False)


def read_verified(path: Path, table: str, digest: str, n_bytes: int) -> pl.DataFrame:
    """`read_snapshot` of a small file: what is parsed is what was hashed, whatever comes between.

    Raises:
        StoreError: missing, not a regular file, damaged, or another table's.
    """
    data = file_bytes(path)
    if len(data) != n_bytes:
        raise StoreError(f"{path}: damaged: {len(data)} bytes instead of {n_bytes}")
    if blake3.blake3(data).hexdigest() != digest:
        raise StoreError(f"{path}: damaged: its bytes do not have the hash {digest}")
    _require_table(path, BytesIO(data), table)
    return pl.read_parquet(data)


def verify_table(path: Path, table: str, digest: str | None = None) -> None:
    """Check a file's hash (by default, its name) and the table it says it is.

    Raises:
        StoreError: missing, damaged, or another table's file.
    """
    verify(path, digest or path.name.partition(".")[0])
    _require_table(path, path, table)


def _require_table(path: Path, source: Path | BytesIO, table: str) -> None:
    found = (pq.read_schema(source).metadata or {}).get(_TABLE_KEY, b"?").decode()
    if found != table:
        raise StoreError(f"{path}: is a '{found}' table, not '{table}'")
