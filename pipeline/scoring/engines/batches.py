"""What goes through a model at once. No cut changes a log-prob beyond the noise floor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.scoring.engines.base import Group
from pipeline.scoring.engines.forward.tree import common_length, sort_key

_WORTH_A_THREAD = 128
"""Tokens; fewer are not divided among threads."""

Row = tuple[int, int]
"""A completion: the number of its group, and its own in it."""


@dataclass(frozen=True)
class _Atom:
    """Completions of one group that stay together."""

    rows: tuple[Row, ...]
    n_own: int


def groups_in(groups: Sequence[Group], rows: Iterable[Row]) -> list[Group]:
    """The rows as groups, in their order; rows of one group must follow one another."""
    members: dict[int, list[int]] = {}
    for g, c in rows:
        members.setdefault(g, []).append(c)
    return [
        Group(groups[g].prompt_ids, tuple(groups[g].completions[c] for c in chosen))
        for g, chosen in members.items()
    ]


def packs(groups: Sequence[Group], batch_tokens: int, n_threads: int) -> list[list[Row]]:
    """Rows in trees of at most `batch_tokens`, of much the same size, the largest first.

    Prompts that begin alike are neighbours, so that they meet in one tree. There are as many as
    keep all threads busy. Only one sequence that is longer makes a larger tree.
    """
    atoms = sorted(_atoms(groups, batch_tokens), key=lambda a: (_prompt_key(groups, a), a.rows))
    costs, previous = [], None
    for atom in atoms:
        prompt = groups[atom.rows[0][0]].prompt_ids
        known = 0 if previous is None else common_length(previous, prompt)
        costs.append(len(prompt) - known + atom.n_own)
        previous = prompt
    total = sum(costs)
    n = -(-total // batch_tokens)
    if n_threads > 1:
        busy = min(n_threads, max(1, total // _WORTH_A_THREAD))
        n = -(-n // busy) * busy
    sized: list[tuple[int, list[Row]]] = []
    passed, last = 0, -1
    for atom, cost in zip(atoms, costs, strict=True):
        which = (2 * passed + cost) * n // (2 * total)
        alone = len(groups[atom.rows[0][0]].prompt_ids) + atom.n_own
        if which == last and sized[-1][0] + cost <= batch_tokens:
            sized[-1] = sized[-1][0] + cost, [*sized[-1][1], *atom.rows]
        else:
            sized.append((alone, list(atom.rows)))
        passed, last = passed + cost, which
    return [rows for _, rows in sorted(sized, key=lambda pack: -pack[0])]


def passes(groups: Sequence[Group]) -> list[list[Row]]:
    """Rows that share a pass by their `pass_id`; every other one alone."""
    found: dict[tuple[int, str], list[Row]] = {}
    for g, group in enumerate(groups):
        for c, completion in enumerate(group.completions):
            key = completion.pass_id or completion.sequence_id
            found.setdefault((g, key), []).append((g, c))
    return list(found.values())


def padded(groups: Sequence[Group], batch_tokens: int) -> list[list[Row]]:
    """Rows in batches of at most `batch_tokens`, with padding and all prompts, longest first."""
    lengths = {
        (g, c): len(group.prompt_ids) + len(completion.ids)
        for g, group in enumerate(groups)
        for c, completion in enumerate(group.completions)
    }
    batches: list[list[Row]] = []
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    # Rows of a group follow one another, as `groups_in` wants them.
    return [sorted(batch) for batch in batches]


def _atoms(groups: Sequence[Group], batch_tokens: int) -> Iterable[_Atom]:
    """Groups, and pieces of those whose completions are too many for one tree."""
    for g, group in enumerate(groups):
        rows: list[Row] = []
        n_own = 0
        for c, completion in enumerate(group.completions):
            n = len(completion.ids)
            if rows and len(group.prompt_ids) + n_own + n > batch_tokens:
                yield _Atom(tuple(rows), n_own)
                rows, n_own = [], 0
            rows.append((g, c))
            n_own += n
        yield _Atom(tuple(rows), n_own)


def _prompt_key(groups: Sequence[Group], atom: _Atom) -> bytes:
    return sort_key(groups[atom.rows[0][0]].prompt_ids)
