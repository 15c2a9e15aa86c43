"""Where tables live: immutable snapshots named by their digest, and a `current` pointer.

A snapshot is written to a temporary file, synced, hashed, and linked to a name made of its hash;
the pointer moves last. A reader therefore sees the old table or the new one, never half of one.
Readers verify size and hash before parsing: Polars does not check Parquet's own checksums.
"""

import contextlib
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import blake3
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.failpoints import reach
from schemas import Table, polars_schema, require_validation

_TABLE_KEY = b"logratio.table"
_GROUP_ROWS = 1 << 16
_verified: set[tuple[str, int, int, int, int]] = set()


@dataclass(frozen=True)
class Snapshot:
    """A published file: its path, its BLAKE3 digest (hex) and its size in bytes."""

    path: Path
    digest: str
    n_bytes: int


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
        n_rows = _write_pieces(sink, checked_pieces, polars_schema(model), name.partition("/")[0])

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
    _verify_table(path, name.partition("/")[0])
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
    _write_pieces(sink, [frame], frame.schema, table)


def _write_pieces(
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
    _verify_table(path, table, digest)
    return pl.read_parquet(path, glob=False, hive_partitioning=False)


def _verify_table(path: Path, table: str, digest: str | None = None) -> None:
    verify(path, digest or path.name.partition(".")[0])
    _require_table(path, path, table)


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


def file_bytes(path: Path) -> bytes:
    """The bytes of a regular file; a link is not followed, for it may lead anywhere.

    Raises:
        StoreError: missing, unreadable or something else than a file.
    """
    try:
        # Without O_NONBLOCK a pipe in the file's place would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from error


def _require_table(path: Path, source: Path | BytesIO, table: str) -> None:
    found = (pq.read_schema(source).metadata or {}).get(_TABLE_KEY, b"?").decode()
    if found != table:
        raise StoreError(f"{path}: is a '{found}' table, not '{table}'")


def verify(path: Path, digest: str, n_bytes: int | None = None) -> None:
    """Check a file's size and BLAKE3 hash; the verdict is kept for as long as its stat is equal.

    Raises:
        StoreError: missing or damaged.
    """
    try:
        found = path.stat()
        key = (digest, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key in _verified:
            return
        if n_bytes is not None and found.st_size != n_bytes:
            raise StoreError(f"{path}: damaged: {found.st_size} bytes instead of {n_bytes}")
        if file_digest(path) != digest:
            raise StoreError(f"{path}: damaged: its bytes do not have the hash {digest}")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from error
    _verified.add(key)


def file_digest(path: Path) -> str:
    """BLAKE3 of a file's bytes, in hex."""
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    if path.stat().st_size:  # an empty file cannot be mapped
        hasher.update_mmap(path)
    return hasher.hexdigest()


def commit(directory: Path, write: Callable[[BinaryIO], Any], suffix: str) -> Snapshot:
    """Write a file so that it is either absent or complete, under a name made of its hash.

    Raises:
        StoreError: the disk is full or failed; names the path, and leaves nothing behind.
    """
    with _temporary(directory) as temporary:
        _write_synced(temporary, write)
        digest = file_digest(temporary)
        final = directory / f"{digest}{suffix}"
        n_bytes = temporary.stat().st_size
        _name(temporary, final, digest)
        reach("store.linked")
        sync_directory(directory)
        reach("store.durable")
    return Snapshot(final, digest, n_bytes)


def _name(temporary: Path, final: Path, digest: str) -> None:
    """Link a file to the name made of its hash; what stands there and is not it is mended."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        with contextlib.suppress(OSError):
            if stat.S_ISREG(final.lstat().st_mode) and file_digest(final) == digest:
                return
        if final.is_dir() and not final.is_symlink():
            os.replace(final, final.with_name(f".{uuid.uuid4().hex}.tmp"))
        os.replace(temporary, final)


def commit_numbered(
    directory: Path, content: bytes, suffix: str, width: int = 8, above: Callable[[], int] = int
) -> Path:
    """Write a file under the next free number; of two writers, one gets it and one the next.

    Args:
        directory: where the numbered files are.
        content: the file's bytes.
        suffix: of all numbered files there.
        width: digits.
        above: the last number that was given out elsewhere; asked after the directory is read.

    Raises:
        StoreError: the disk is full or failed.
    """
    with _temporary(directory) as temporary:
        _write_synced(temporary, lambda sink: sink.write(content))
        taken = [int(p.stem) for p in directory.glob(f"*{suffix}") if p.stem.isdigit()]
        number = max([*taken, above()]) + 1
        while True:
            final = directory / f"{number:0{width}d}{suffix}"
            try:
                os.link(temporary, final)
            except FileExistsError:
                number += 1
            else:
                break
        reach("store.numbered")
        sync_directory(directory)
        reach("store.durable")
    return final


def move_pointer(pointer: Path, target: Path) -> None:
    """Point `pointer` (a symbolic link in the target's directory) at `target`, atomically."""
    temporary = pointer.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        os.symlink(target.name, temporary)
        reach("pointer.made")
        os.replace(temporary, pointer)
        reach("pointer.moved")
        sync_directory(pointer.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{pointer}: cannot be moved: {error.strerror}") from error


def sync_directory(directory: Path) -> None:
    """Make a directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with path.open("wb") as sink:
        reach("store.opened")
        write(sink)
        sink.flush()
        reach("store.written")
        os.fsync(sink.fileno())
    reach("store.synced")


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    """A temporary name beside the final one (a link needs the same file system)."""
    temporary = directory / f".{uuid.uuid4().hex}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise StoreError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
