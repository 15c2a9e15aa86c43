"""Bringing a reference's log-probs into the numerics the trainer computes in.

Two numerics of one model differ a little, so subtracting a reference scored in one from a policy
computed in the other would bake a fixed error into every pair. The start model is known in both,
and its difference is taken as the reference's: ref + (start here - start there).
"""

from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from pipeline.errors import TrainingError


@dataclass(frozen=True)
class Correction:
    """What was added to the reference's log-probs: absolute nats per sequence, over `n`."""

    n: int
    mean: float
    largest: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


def correct_reference(
    reference: pl.DataFrame, start_here: pl.DataFrame, start_there: pl.DataFrame
) -> tuple[pl.DataFrame, Correction]:
    """The reference's rows that the start has in both numerics, corrected.

    Where the reference is the start itself, its corrected value is exactly the trainer's own, so
    that step 0 is exactly 0.

    Args:
        reference: `schemas.LogProb` of the reference, in its own numerics.
        start_here: the start's, in the trainer's numerics.
        start_there: the start's, in the reference's numerics.

    Returns:
        `schemas.LogProb` rows of the reference with corrected `logprob`, and what was added.

    Raises:
        TrainingError: no sequence is in all three.
    """
    here, there = (
        frame.select("sequence_id", pl.col("logprob").alias(name))
        for frame, name in ((start_here, "here"), (start_there, "there"))
    )
    joined = reference.join(here, on="sequence_id").join(there, on="sequence_id")
    if joined.is_empty():
        raise TrainingError("the reference cannot be corrected: no sequence is scored three times")
    # Regrouped: where reference and start are equal, nothing is added to `here`, not even rounding.
    corrected = pl.col("here") + (pl.col("logprob") - pl.col("there"))
    added = (joined["here"] - joined["there"]).abs()
    return (
        joined.with_columns(logprob=corrected).select(reference.columns).sort("sequence_id"),
        Correction(
            joined.height, float(added.sum()) / joined.height, float(added.to_numpy().max())
        ),
    )
