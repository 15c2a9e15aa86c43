"""What engines die of: an item is tried again, then divided, until it is known which row it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ScoringError
from pipeline.scoring.engines.base import EngineDied

ATTEMPTS = 2
"""Engines that an item may cost before it is divided: the first may have died of something else."""

DEATHS_IN_A_ROW = 16
"""Engines that may die with nothing done in between; 2,048 rows are one after 11 halvings."""

DEATHS = 64
"""Engines that may die in one pass."""

Divide = Callable[[Any], list[Any]]
"""An item that engines die of to smaller ones; none if it cannot be divided."""


@dataclass(frozen=True)
class Lost:
    """Stands for the result of an item that engines die of, and that cannot be divided."""

    item: Any
    detail: str


@dataclass(frozen=True)
class Waiting:
    """An item that is to be done, and how many engines may still die of it."""

    item: Any
    attempts: int = ATTEMPTS

    def after(self, error: EngineDied, divide: Divide | None) -> "list[Waiting] | Lost":
        """What is to be done when an engine died of it.

        Raises:
            ScoringError: that was the last attempt, and nobody says how to divide it.
        """
        if self.attempts > 1:
            return [Waiting(self.item, self.attempts - 1)]
        if divide is None:
            raise ScoringError(f"an engine died of it {ATTEMPTS} times: {error}") from error
        # Whatever comes of it is suspect, and has one attempt.
        return [Waiting(item, 1) for item in divide(self.item)] or Lost(self.item, str(error))


@dataclass
class Deaths:
    """Engines that died in a pass."""

    total: int = 0
    in_a_row: int = 0

    def count(self, error: EngineDied) -> None:
        """One more.

        Raises:
            ScoringError: there were too many: it is not some rows that they die of.
        """
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= DEATHS_IN_A_ROW or self.total >= DEATHS:
            raise ScoringError(
                f"engines died {self.total} times, {self.in_a_row} of them with nothing scored in "
                f"between: {error}"
            ) from error
