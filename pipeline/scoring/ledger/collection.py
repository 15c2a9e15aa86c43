"""Garbage collection: what nobody will read again, named or removed; never what is referenced.

Garbage is a manifest that an intact one replaces, a part no manifest names, a temporary file, and
what was set aside. A scorer's commits in flight are waited for and new ones wait, so that no file's
age has to be asked. Killed anywhere, the rest is collected the next time.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.failpoints import reach
from pipeline.locks import locked
from pipeline.scoring.ledger.commits import TABLES, read_part, scorer_directories
from pipeline.scoring.ledger.differences import DIFFERENCES
from pipeline.scoring.ledger.manifests import (
    ASIDE,
    FOLDER,
    Manifest,
    in_force,
    number_aside,
    present,
)
from pipeline.store import sync_directory


@dataclass(frozen=True)
class Garbage:
    """Something nobody will read again: a file, or a directory in a file's place."""

    path: Path
    n_bytes: int
    why: str


def collect(ledger: Path, *, remove: bool = False) -> list[Garbage]:
    """Find the garbage of a ledger, and remove it if told so.

    Raises:
        StoreError: the disk failed, or the file system cannot lock.
    """
    found = []
    for directory in scorer_directories(ledger):
        with locked(directory, alone=True):
            manifests = present(directory, damaged=lambda path, error: None)
            replaced = _replaced(directory, manifests)
            files = list(_files(directory, [m for m in manifests if m not in replaced]))
            garbage = [Garbage(m.path, m.path.stat().st_size, "replaced") for m in replaced]
            if remove:
                # Manifests first: one whose parts are gone would look damaged.
                _remove(garbage, directory, "collect.manifest")
                reach("collect.manifests")
                _remove(files, directory, "collect.file")
            found += garbage + files
    return found


def _replaced(directory: Path, manifests: list[Manifest]) -> list[Manifest]:
    """Those for which an intact commit stands; its parts are read to be sure."""
    sound = [one for one in manifests if not one.replaces or _intact(directory, one)]
    kept = {one.name for one in in_force(sound)}
    names = {name for one in sound for name in one.replaces} - kept
    return [one for one in manifests if one.name in names]


def _intact(directory: Path, one: Manifest) -> bool:
    try:
        for name in one.parts:
            read_part(directory, one, name)
    except StoreError:
        return False
    return True


def _files(directory: Path, kept: list[Manifest]) -> Iterator[Garbage]:
    """What is no manifest and is not referenced by those that are kept."""
    referenced = {directory / name / part.file for one in kept for name, part in one.parts.items()}
    for name in TABLES:
        for path in _entries(directory / name):
            if path.suffix == ".parquet" and path not in referenced:
                yield Garbage(path, _size(path), "no manifest names it")
    for name in (*TABLES, FOLDER, "trust", DIFFERENCES):
        for path in _entries(directory / name):
            if path.name.startswith(".") and path.suffix == ".tmp":
                yield Garbage(path, _size(path), "temporary")
    # The highest number stays, for it would be given out again.
    highest = max((one.number for one in kept), default=0)
    for path in _entries(directory / ASIDE):
        number = number_aside(path)
        if number is None or number < highest:
            yield Garbage(path, _size(path), "set aside")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    return path.lstat().st_size


def _remove(garbage: list[Garbage], directory: Path, point: str) -> None:
    try:
        for one in garbage:
            if one.path.is_dir() and not one.path.is_symlink():
                shutil.rmtree(one.path)
            else:
                with contextlib.suppress(FileNotFoundError):  # set aside by a reader
                    os.unlink(one.path)
            reach(point)
        for folder in {one.path.parent for one in garbage}:
            sync_directory(folder)
    except OSError as error:
        raise StoreError(f"{directory}: cannot be cleared: {error.strerror}") from error
