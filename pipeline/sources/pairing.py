"""Pairs of a list of candidates for one prompt."""

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

from pipeline.sources.base import Candidate, ReadOptions, RowError, Unit
from pipeline.sources.fields import gap

MOST_OF_ALL = 200
"""Candidates that `all` pairs with each other, which makes 19,900 pairs."""


def pair(
    candidates: Sequence[Candidate],
    options: ReadOptions,
    meta: dict[str, object] | None = None,
    *,
    ranked: bool = False,
) -> list[Unit | RowError]:
    """The pairs that candidates of one prompt make, best scores first.

    Equal scores keep the candidates' order. `best_worst` makes one pair (of several best the
    first, of several worst the last), `adjacent` one of each candidate and the next below it, `all`
    one of every two. A pair's `meta` is `meta`, with the candidates' own under `chosen_candidate`
    and `rejected_candidate`.

    Args:
        candidates: with one and the same prompt.
        options: `pairing` and `min_gap`.
        meta: what the pairs have in common.
        ranked: scores are negative ranks: a pair keeps their distance as its strength, no scores.

    Returns:
        Pairs, and a `RowError` for what makes none: a blank candidate (`empty_reply`), too few
        others (`no_rival`), too many for `all` (`too_many_rivals`), two equal scores (`tied`) or
        two less than `min_gap` apart (`gap_too_small`).
    """
    made: list[Unit | RowError] = []
    usable = []
    for index, candidate in enumerate(candidates):
        if not candidate.completion or candidate.completion.isspace():
            made.append(RowError("empty_reply", f"candidate {index} of the prompt is blank"))
        else:
            usable.append((index, candidate))
    if len(usable) < 2:
        made.append(RowError("no_rival", f"{len(usable)} usable candidates are no pair"))
        return made
    order = sorted(usable, key=lambda entry: -entry[1].score)
    couples: Iterable[tuple[tuple[int, Candidate], tuple[int, Candidate]]]
    match options.pairing:
        case "best_worst":
            couples = [(order[0], order[-1])]
        case "adjacent":
            couples = pairwise(order)
        case "all":
            if len(order) > MOST_OF_ALL:
                made.append(
                    RowError("too_many_rivals", f"{len(order)} candidates, at most {MOST_OF_ALL}")
                )
                return made
            couples = combinations(order, 2)
    for (i, better), (j, worse) in couples:
        try:
            strength = preferred_by(gap(better.score, worse.score), options.min_gap, (i, j))
        except RowError as error:
            made.append(error)
            continue
        scores = None if ranked else (better.score, worse.score)
        more = dict(meta or {})
        if better.meta:
            more["chosen_candidate"] = better.meta
        if worse.meta:
            more["rejected_candidate"] = worse.meta
        made.append(
            Unit(better.prompt, better.completion, worse.completion, strength, scores, more)
        )
    return made


def preferred_by(difference: float, min_gap: float, which: tuple[int, int]) -> float:
    """The difference of two scores, if it states a preference.

    Raises:
        RowError: `tied`, `gap_too_small`, naming the candidates `which`.
    """
    if difference == 0:
        raise RowError("tied", f"candidates {which[0]} and {which[1]} are equally good")
    if difference < min_gap:
        raise RowError(
            "gap_too_small",
            f"candidates {which[0]} and {which[1]} are {difference:g} apart, less than {min_gap:g}",
        )
    return difference
