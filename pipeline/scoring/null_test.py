"""The null test: does scoring the same thing twice give the same numbers?

Past the ledger, a sample is scored twice in equal batches (exactly 0 apart) and once in other
batches (the noise floor), and compared with what the ledger holds. If an identity ever lies, say
because weights changed and their fingerprint did not, the ledger holds another model's numbers
and the last comparison shows it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from pipeline.ids import unit_interval
from pipeline.scoring.engines.base import (
    Engine,
    Group,
    check_logprobs,
    groups_of,
    longest,
    sequence_sum,
)
from pipeline.scoring.memory import OutOfMemory, score_within_memory


@dataclass(frozen=True)
class NullTest:
    """Largest differences per sequence, nats, over `n` sequences.

    Attributes:
        repeat: between two passes in equal batches.
        noise_floor: between passes in different batches.
        ledger: between a fresh pass and the ledger.
        tolerance: what `noise_floor` and `ledger` may be.
    """

    n: int
    repeat: float
    noise_floor: float
    ledger: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Equal batches are exactly equal, and the rest is within the tolerance.

        Where nothing could be scored there was no test, and so none was passed.
        """
        largest = max(self.noise_floor, self.ledger)
        return self.n > 0 and self.repeat == 0.0 and largest <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


def null_test(
    engine: Engine,
    ledger: pl.DataFrame,
    sequences: pl.DataFrame,
    n_rows: int,
    batch_tokens: int,
    tolerance: float,
) -> NullTest:
    """Re-score a sample of `sequences` that the ledger already holds.

    The sample is the first `n_rows` ids in the order of a hash, so it is the same for the same
    sequences.

    Raises:
        ScoringError: the engine returned what cannot be a log-prob.
    """
    held = dict(ledger.select("sequence_id", "logprob").iter_rows())
    ids = sorted(set(sequences["sequence_id"]) & set(held), key=lambda i: unit_interval(i, "null"))
    sample = ids[:n_rows]
    if not sample:
        return NullTest(0, 0.0, 0.0, 0.0, tolerance)
    groups = groups_of(sequences.filter(pl.col("sequence_id").is_in(sample)))
    first = sums(engine, groups, batch_tokens)
    again = sums(engine, groups, batch_tokens)
    # Everything in one padded pass, or one by one where that is not what was done above.
    other = sums(engine, groups, 0 if batch_tokens else longest(groups) * len(sample))
    return NullTest(
        n=len(sample),
        repeat=_largest(first, again),
        noise_floor=_largest(first, other),
        ledger=_largest(first, {i: held[i] for i in sample}),
        tolerance=tolerance,
    )


def sums(engine: Engine, groups: list[Group], batch_tokens: int) -> dict[str, float]:
    """Sequence log-probs by id: float64 sums, nats; without those that do not fit in memory."""
    result = {}
    found = score_within_memory(engine, groups, batch_tokens)
    for group, scored in zip(groups, found, strict=True):
        for completion, logprobs in zip(group.completions, scored, strict=True):
            if isinstance(logprobs, OutOfMemory):
                continue
            check_logprobs(completion, logprobs)
            result[completion.sequence_id] = sequence_sum(logprobs)
    return result


def _largest(a: dict[str, float], b: dict[str, float]) -> float:
    return max((abs(a[i] - b[i]) for i in a.keys() & b.keys()), default=0.0)
