"""Sequences as a tree of token runs: what several begin with in common is there once.

Prompts are shared among the replies of a group and across groups: an equal prompt, a system prompt,
earlier turns of one conversation, an earlier turn's reply among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WORTH_SHARING = 8
"""Tokens; shorter runs are computed for each sequence, since every run costs calls of its own."""


@dataclass(frozen=True)
class Run:
    """Tokens that follow one another and have the same past.

    Attributes:
        start: its first token's place in `Tree.ids`.
        path: places of all tokens on the way to its end, its own among them: int64 [position + n].
        n: how many tokens it has.
    """

    start: int
    path: np.ndarray
    n: int

    @property
    def position(self) -> int:
        """Tokens before it on its path."""
        return len(self.path) - self.n


@dataclass(frozen=True)
class Tree:
    """Several sequences without what they repeat.

    Attributes:
        ids: token ids, int64 [T].
        positions: how many tokens come before each, int64 [T].
        runs: in the order of their tokens; a run comes after the one it continues.
        places: for each sequence, where its tokens are, int64 [n].
    """

    ids: np.ndarray
    positions: np.ndarray
    runs: tuple[Run, ...]
    places: tuple[np.ndarray, ...]


def grow(sequences: Sequence[np.ndarray]) -> Tree:
    """Put sequences of token ids, each integers [n] with n > 0, into a tree.

    The same sequences in another order make the same tree.
    """
    order = sorted(range(len(sequences)), key=lambda i: sort_key(sequences[i]))
    rows = [sequences[i] for i in order]
    common = [common_length(a, b) for a, b in pairwise(rows)]
    ids: list[np.ndarray] = []
    runs: list[Run] = []
    places: dict[int, np.ndarray] = {}
    n_tokens = 0
    # Branches still to grow: rows from first to last, which agree on the path so far.
    branches = _branches(common, 0, len(rows), 0, np.zeros(0, np.int64))
    while branches:
        first, last, path = branches.pop()
        depth = len(path)
        end = min([len(rows[first]), *common[first : last - 1]])
        if end > depth:
            own = np.arange(n_tokens, n_tokens + end - depth)
            path = np.concatenate([path, own])
            ids.append(rows[first][depth:end])
            runs.append(Run(n_tokens, path, end - depth))
            n_tokens += end - depth
        while first < last and len(rows[first]) == end:  # sorted: those that end here come first
            places[order[first]] = path
            first += 1
        branches += _branches(common, first, last, end, path)
    flat = np.concatenate(ids).astype(np.int64)
    positions = np.concatenate([np.arange(run.position, len(run.path)) for run in runs])
    return Tree(flat, positions, tuple(runs), tuple(places[i] for i in range(len(rows))))


def sort_key(ids: np.ndarray) -> bytes:
    """Bytes whose order is that of the token ids, the first one counting most."""
    return ids.astype(">u4").tobytes()


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _branches(
    common: list[int], first: int, last: int, depth: int, path: np.ndarray
) -> list[tuple[int, int, np.ndarray]]:
    """Cut rows where neighbours do not share enough beyond `depth`; the last branch first."""
    cuts = [i + 1 for i in range(first, last - 1) if common[i] < depth + WORTH_SHARING]
    edges = [first, *cuts, last] if first < last else []
    return [(a, b, path) for a, b in pairwise(edges)][::-1]
