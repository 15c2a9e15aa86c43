"""Files and directories that are absent or complete, and files' bytes checked before use."""

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import blake3

from pipeline.errors import StoreError
from pipeline.failpoints import reach

_verified: set[tuple[str, int, int, int, int]] = set()


@dataclass(frozen=True)
class Snapshot:
    """A published file: its path, its BLAKE3 digest (hex) and its size in bytes."""

    path: Path
    digest: str
    n_bytes: int


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


@contextlib.contextmanager
def whole_directory(final: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A directory to fill, which then appears under the name `final`; whole, or not at all.

    Args:
        final: its name; the directory stands beside it meanwhile, as `.<name>.<random>.tmp`.
        exclusive: what comes to stand there meanwhile is not an equal one, which would win.

    Raises:
        StoreError: it is exclusive, and something else came to stand there.
    """
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish_directory(temporary, final)
        if exclusive and temporary.exists():
            raise StoreError(f"{final}: something else was written there meanwhile")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_directory(temporary: Path, final: Path) -> None:
    """Make a finished directory visible under its name, durably; an equal one there wins."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_directory(temporary)
    try:
        temporary.rename(final)
    except OSError:
        if not final.exists():
            raise
    sync_directory(final.parent)


def sync_directory(directory: Path) -> None:
    """Make a directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
