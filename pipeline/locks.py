"""Locks between processes of one machine, or of several over a file system that has them."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import StoreError


@contextlib.contextmanager
def locked(
    directory: Path, *, alone: bool = False, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold a directory's lock, with others who do not want it alone.

    The system gives the lock back when its holder ends, however it ends.

    Args:
        directory: made if it is not there; its file `lock` is locked.
        alone: whether nobody else may hold it.
        waiting: called once if somebody else does.

    Raises:
        StoreError: the file system cannot lock, or cannot be written.
    """
    path = directory / "lock"
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    try:
        descriptor = _opened(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        try:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, how)
        except OSError as error:
            raise StoreError(f"{path}: cannot be locked: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    for _ in range(3):  # whoever had the lock may have removed the directory in between
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
