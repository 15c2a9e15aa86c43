"""A plan's tables and files: what is published, and the current snapshot of each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.store.files import Snapshot, commit, move_pointer
from pipeline.store.parquet import (
    checked,
    read_snapshot,
    verify_table,
    write_parquet,
    write_pieces,
)
from schemas import Table, polars_schema


@dataclass(frozen=True)
class TableSnapshot(Snapshot):
    """A published table, with its number of rows."""

    n_rows: int


@dataclass(frozen=True)
class Store:
    """A directory that holds one plan's tables and files, and the ledger all plans share."""

    root: Path
    plan: str

    @property
    def directory(self) -> Path:
        """Where this plan's tables are."""
        return self.root / self.plan

    @property
    def ledger(self) -> Path:
        """Where log-probs are; shared, since a log-prob is a fact about a model and token ids."""
        return self.root / "ledger"

    @property
    def models(self) -> Path:
        """Where checkpoints made from packages are."""
        return self.root / "models"

    @property
    def policies(self) -> Path:
        """Where trained policies are, by policy id."""
        return self.root / "policies"

    def current(self, name: str, suffix: str = ".parquet") -> Path:
        """The pointer to the current snapshot of a table or file."""
        return self.directory / name / f"current{suffix}"


def publish(store: Store, name: str, frame: pl.DataFrame, model: type[Table]) -> TableSnapshot:
    """Validate `frame` against `model` and make it the current snapshot of table `name`.

    Equal frames give equal bytes and so the same snapshot.

    Raises:
        pandera.errors.SchemaErrors: the frame breaks the table's contract.
        StoreError: a value is NaN or infinite, or the disk failed.
    """
    validated = checked(name, frame, model)
    snapshot = commit(
        store.directory / name,
        lambda sink: write_parquet(sink, validated, name.partition("/")[0]),
        ".parquet",
    )
    move_pointer(store.current(name), snapshot.path)
    return TableSnapshot(snapshot.path, snapshot.digest, snapshot.n_bytes, frame.height)


def publish_pieces(
    store: Store, name: str, pieces: Iterable[pl.DataFrame], model: type[Table]
) -> TableSnapshot:
    """`publish`, of a table that comes in pieces and never is in memory as a whole.

    Each piece is validated by itself: what a column promises over all rows (`unique`) the caller
    must see to. Equal rows give equal bytes, however they are cut.

    Raises:
        pandera.errors.SchemaErrors: a piece breaks the table's contract.
        StoreError: a value is NaN or infinite, or the disk failed.
    """
    n_rows = 0

    def write(sink: BinaryIO) -> None:
        nonlocal n_rows
        checked_pieces = (checked(name, piece, model) for piece in pieces)
        n_rows = write_pieces(sink, checked_pieces, polars_schema(model), name.partition("/")[0])

    snapshot = commit(store.directory / name, write, ".parquet")
    move_pointer(store.current(name), snapshot.path)
    return TableSnapshot(snapshot.path, snapshot.digest, snapshot.n_bytes, n_rows)


def publish_file(store: Store, name: str, content: bytes, suffix: str) -> Snapshot:
    """Make `content` the current snapshot of file `name`, in the same way as a table."""
    snapshot = commit(store.directory / name, lambda sink: sink.write(content), suffix)
    move_pointer(store.current(name, suffix), snapshot.path)
    return snapshot


def read(store: Store, name: str) -> pl.DataFrame:
    """The current snapshot of table `name`, verified.

    Raises:
        StoreError: there is none, or its bytes are not those that were published.
    """
    return read_snapshot(current_snapshot(store, name).path, name.partition("/")[0])


def is_published(store: Store, name: str) -> bool:
    """Whether table `name` has ever been published."""
    return store.current(name).is_symlink()


def read_pieces(
    store: Store, name: str, columns: list[str] | None = None, n_rows: int = 1 << 13
) -> Iterator[pl.DataFrame]:
    """The current snapshot of table `name`, verified; `n_rows` at a time, all columns or some.

    Raises:
        StoreError: there is none, or its bytes are not those that were published.
    """
    path = current_snapshot(store, name).path
    verify_table(path, name.partition("/")[0])
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(n_rows, columns=columns):
            frame = pl.from_arrow(pa.Table.from_batches([batch]))
            assert isinstance(frame, pl.DataFrame)
            yield frame


def current_snapshot(store: Store, name: str, suffix: str = ".parquet") -> Snapshot:
    """The current snapshot of a table or file, without reading it.

    Raises:
        StoreError: nothing was published under that name, or the snapshot is gone.
    """
    pointer = store.current(name, suffix)
    if pointer.is_symlink() and not pointer.exists():
        raise StoreError(f"{pointer.resolve()}: is the current snapshot of '{name}' and is missing")
    if not pointer.exists():
        raise StoreError(f"{pointer}: nothing has been published under '{name}' yet")
    path = pointer.resolve()
    return Snapshot(path, path.name.removesuffix(suffix), path.stat().st_size)
