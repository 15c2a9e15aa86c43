"""Manifests: what is committed, in which order, and what has been replaced.

A manifest is JSON: a body, as text, and the BLAKE3 of that text. The body names the parts of the
commit; one made by compaction also names the manifests it replaces and takes the place of the first
of them in the order. A manifest whose replacement is intact is not read; when the replacement is
damaged, it is again. A number is never given out twice: what is set aside keeps its own.
"""

import contextlib
import json
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import blake3

from pipeline.errors import StoreError
from pipeline.failpoints import reach
from pipeline.store import commit_numbered, file_bytes, sync_directory

_log = logging.getLogger(__name__)
FOLDER, ASIDE = "manifest", "set_aside"


@dataclass(frozen=True)
class Part:
    """A file of a commit, as its manifest has it."""

    file: str
    blake3: str
    bytes: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """One commit.

    Attributes:
        path: where it is; its stem is its number.
        seal: BLAKE3 of its body.
        order: its place among the commits: its number, or that of the first one it replaces.
        parts: table name to part; a table without rows has none.
        scorer: the `schemas.Scorer` row of the commit.
        replaces: (file name, seal) of each manifest it was compacted from.
    """

    path: Path
    seal: str
    order: int
    parts: dict[str, Part]
    scorer: dict[str, Any]
    replaces: frozenset[tuple[str, str]]

    @property
    def name(self) -> tuple[str, str]:
        """What a replacement calls it."""
        return self.path.name, self.seal

    @property
    def number(self) -> int:
        """Of the commit; later ones are higher."""
        return int(self.path.stem)


def commit_manifest(
    directory: Path,
    parts: dict[str, Part],
    scorer: dict[str, Any],
    replaced: list[Manifest] | None = None,
) -> None:
    """Make parts that are there already a commit of the scorer in `directory`.

    Raises:
        StoreError: the disk failed.
    """
    body: dict[str, Any] = {
        "parts": {name: vars(part) for name, part in parts.items()},
        "scorer": scorer,
    }
    if replaced:
        names = {name for one in replaced for name in (one.name, *one.replaces)}
        body["order"] = min(one.order for one in replaced)
        body["replaces"] = sorted(names)
    text = json.dumps(body, sort_keys=True)
    sealed = json.dumps({"blake3": blake3.blake3(text.encode()).hexdigest(), "body": text})
    commit_numbered(
        directory / FOLDER, sealed.encode(), ".json", above=partial(_last_aside, directory)
    )


def present(
    directory: Path, damaged: Callable[[Path, StoreError], None] | None = None
) -> list[Manifest]:
    """Every intact manifest of a scorer, in order; `damaged` is told of others.

    By default they are set aside with a warning.
    """
    found = []
    for path in sorted((directory / FOLDER).glob("*.json")):
        try:
            found.append(open_manifest(path))
        except StoreError as error:
            (damaged or set_aside)(path, error)
    return sorted(found, key=lambda one: (one.order, one.number))


def in_force(manifests: list[Manifest]) -> list[Manifest]:
    """Those that no other one replaces, in order."""
    replaced = {name for one in manifests for name in one.replaces}
    return [one for one in manifests if one.name not in replaced]


def open_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        StoreError: damaged.
    """
    try:
        sealed = json.loads(file_bytes(path))
        text = sealed["body"]
        if blake3.blake3(text.encode()).hexdigest() != sealed["blake3"]:
            raise ValueError("its bytes do not have the hash it names")
        body = json.loads(text)
        return Manifest(
            path,
            sealed["blake3"],
            body.get("order", int(path.stem)),
            {name: Part(**part) for name, part in body["parts"].items()},
            body["scorer"],
            frozenset((name, seal) for name, seal in body.get("replaces", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: damaged: {error}") from error


def set_aside(path: Path, why: StoreError) -> None:
    """Take a commit out of the ledger; its bytes stay for whoever wants to know."""
    _log.warning("set aside, will be scored again: %s", why)
    aside = path.parent.parent / ASIDE
    reach("ledger.set_aside")
    try:
        aside.mkdir(exist_ok=True)
        n = len(list(aside.iterdir()))
        with contextlib.suppress(FileNotFoundError):  # another reader has done it
            os.replace(path, aside / f"{n:08d}-{path.name}")
        sync_directory(path.parent)
    except OSError as error:  # whoever may only read can do without
        _log.warning("%s: cannot be set aside: %s", path, error.strerror)


def number_aside(path: Path) -> int | None:
    """The number of a manifest that was set aside, by its name; None of something else."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else None


def _last_aside(directory: Path) -> int:
    aside = directory / ASIDE
    numbers = [number_aside(path) or 0 for path in aside.iterdir()] if aside.exists() else []
    return max(numbers, default=0)


def is_file(path: Path) -> bool:
    """Whether a regular file is there; a link is none."""
    with contextlib.suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False
