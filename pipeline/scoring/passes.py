"""Which sequences go through a model together.

The two replies of a pair share their prompt, so one forward pass over prompt, chosen and rejected
costs a third to a half less than two. A log-prob's last bits depend on the shape of its pass; for
step 0 of training to be exactly 0, scoring and training must cut passes alike. So the rule reads
the pairs alone: a pair whose two sequences are in no other pair is one pass, and every other
sequence is a pass of its own.
"""

import polars as pl


def pair_passes(pair_sequences: pl.DataFrame) -> pl.DataFrame:
    """`sequence_id` to `pass_id`, the pair's id, of the sequences that share a pass.

    Args:
        pair_sequences: `schemas.PairSequence`, of one tokenisation.
    """
    sides = pair_sequences.select(
        "pair_id", sequence_id=pl.concat_list("chosen_id", "rejected_id")
    ).explode("sequence_id")
    alone = sides.filter(pl.len().over("sequence_id") == 1)
    whole = alone.filter(pl.len().over("pair_id") == 2)
    return whole.select("sequence_id", pass_id="pair_id").sort("sequence_id")


def with_passes(sequences: pl.DataFrame, pair_sequences: pl.DataFrame) -> pl.DataFrame:
    """The sequences with a column `pass_id`, null for those that go alone."""
    return sequences.join(pair_passes(pair_sequences), on="sequence_id", how="left")
