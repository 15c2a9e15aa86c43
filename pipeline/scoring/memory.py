"""Scoring within memory: what does not fit is tried in halves, down to a sequence alone."""

import gc
import itertools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipeline.scoring.engines.base import Engine, Group

_log = logging.getLogger(__name__)
_SAID = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.I)
"""How torch says it on a GPU, on a CPU and in its libraries, if not by the error's type."""


@dataclass(frozen=True)
class OutOfMemory:
    """What stands for the log-probs of a sequence that does not fit even alone."""

    detail: str


Scored = list[list[np.ndarray | OutOfMemory]]
"""As `Engine.score` returns it, but for what does not fit."""

_Result = TypeVar("_Result")


def score_within_memory(engine: Engine, groups: Sequence[Group], batch_tokens: int) -> Scored:
    """`Engine.score`; where it is out of memory, the same in halves (`within_memory`).

    Raises:
        ScoringError: as the engine does.
    """
    return within_memory(lambda some: engine.score(some, batch_tokens), groups)


def within_memory(
    score: Callable[[Sequence[Group]], list[list[_Result]]], groups: Sequence[Group]
) -> list[list[_Result | OutOfMemory]]:
    """Have groups scored; where that is out of memory, the same in halves, in the same order.

    At most 2n - 1 calls for n sequences. Completions of one group are separated last, since they
    may share a pass.

    Raises:
        ScoringError: as `score` does.
    """
    try:
        return [list(group) for group in score(groups)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}"
    # Out of the clause above, which would hold on to all that the call had made.
    _release()
    halves = halved(groups)
    if halves is None:
        return [[OutOfMemory(said)]]
    left, right = halves
    _log.warning("out of memory, going on in halves: %s", said)
    first, second = (within_memory(score, half) for half in halves)
    if left[-1].prompt_ids is right[0].prompt_ids:  # one group, cut in two
        return [*first[:-1], [*first[-1], *second[0]], *second[1:]]
    return [*first, *second]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an engine failed for want of memory, and is otherwise well."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def halved(groups: Sequence[Group]) -> tuple[list[Group], list[Group]] | None:
    """Groups in two parts of about as many sequences; None of one sequence.

    Between two groups, unless that would leave one part more than three quarters.
    """
    sizes = [len(group.completions) for group in groups]
    ends = list(itertools.accumulate(sizes))
    n = ends[-1]
    if n == 1:
        return None
    nearest = min(range(len(ends)), key=lambda g: abs(2 * ends[g] - n))
    if n <= 4 * ends[nearest] <= 3 * n:
        return list(groups[: nearest + 1]), list(groups[nearest + 1 :])
    g = next(g for g, end in enumerate(ends) if 2 * end >= n)
    at = max(1, n // 2 - (ends[g] - sizes[g]))
    cut, completions = groups[g], groups[g].completions
    if at >= sizes[g]:
        return list(groups[: g + 1]), list(groups[g + 1 :])
    return (
        [*groups[:g], Group(cut.prompt_ids, completions[:at])],
        [Group(cut.prompt_ids, completions[at:]), *groups[g + 1 :]],
    )


def _release() -> None:
    """Give back what the failed call held on a GPU, so that half of it can have it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
