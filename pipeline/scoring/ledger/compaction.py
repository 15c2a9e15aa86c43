"""Compaction: many small commits become few, and no published number changes.

Neighbours in the order are merged into one commit that takes the place of the first, so the first
committed value of a sequence stays the one that is read. What is replaced stays on the disk, and
counts again if the merged commit is ever damaged, until garbage is collected. Killed anywhere, the
ledger reads as before; another compaction or a commit beside it does no harm.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.failpoints import reach
from pipeline.locks import locked
from pipeline.scoring.ledger.commits import (
    TABLES,
    commit_parts,
    merged,
    read_commits,
)
from pipeline.scoring.ledger.manifests import Manifest, commit_manifest, in_force, present

ROWS = 1 << 15
"""Of a merged commit, about: its token log-probs are some 50 MB, and are in memory at once."""


@dataclass(frozen=True)
class Compacted:
    """Commits in force before and after."""

    before: int
    after: int


def compact(directory: Path, rows: int = ROWS) -> Compacted:
    """Merge the commits of a scorer's directory into few of about `rows` sequences each.

    Raises:
        StoreError: the disk failed; nothing is lost.
    """
    commits = in_force(present(directory))
    for run in _runs(commits, rows):
        with locked(directory):
            _merge(directory, run)
    return Compacted(len(commits), len(in_force(present(directory))))


def _runs(commits: list[Manifest], rows: int) -> Iterator[list[Manifest]]:
    """Neighbours of together about `rows` sequences; a large one is left as it is."""
    run: list[Manifest] = []
    total = 0
    for one in commits:
        size = max((part.rows for part in one.parts.values()), default=0)
        if total + size > rows:
            if len(run) > 1:
                yield run
            run, total = [], 0
        run.append(one)
        total += size
    if len(run) > 1:
        yield run


def _merge(directory: Path, run: list[Manifest]) -> None:
    tables = {}
    seals = frozenset(one.seal for one in run)
    for name in TABLES:
        commits, frames = read_commits(directory, name, seals)
        if commits != run:
            return  # one was damaged, or another compaction was faster
        tables[name] = merged(commits, frames, name)
    reach("compact.read")
    commit_manifest(directory, commit_parts(directory, tables), run[0].scorer, run)
    reach("compact.committed")
