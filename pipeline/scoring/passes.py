"""Which sequences go through a model together.

The two replies of a pair share their prompt, so one forward pass over prompt, chosen and rejected
costs a third to a half less than two; so do the two mismatched replies under a pair's prompt. A
log-prob's last bits depend on the shape of its pass; for step 0 of training to be exactly 0,
scoring and training must cut passes alike. So the rule reads the tables alone: a pair whose
sequences are in no other pair is one pass, and every other sequence is a pass of its own.
"""

import polars as pl


def with_passes(
    sequences: pl.DataFrame, pair_sequences: pl.DataFrame, *kl: pl.DataFrame
) -> pl.DataFrame:
    """The sequences with a column `pass_id`, null for those that go alone.

    Args:
        sequences: `schemas.Sequence`.
        pair_sequences: `schemas.PairSequence`, of one tokenisation.
        kl: `schemas.KlSequence`, a table for each objective that has one.
    """
    sides = pair_sequences.select(
        pl.col("pair_id").alias("pass_id"), sequence_id=pl.concat_list("chosen_id", "rejected_id")
    ).explode("sequence_id")
    mismatched = [
        table.select(
            pl.format("{} kl {} {}", "pair_id", pl.lit(k), pl.col("step").fill_null(0)).alias(
                "pass_id"
            ),
            "sequence_id",
        )
        for k, table in enumerate(kl)
    ]
    members = pl.concat([sides, *mismatched]).with_columns(alone=pl.len().over("sequence_id") == 1)
    shared = members.filter(pl.col("alone").all().over("pass_id")).drop("alone")
    return sequences.join(shared, on="sequence_id", how="left", maintain_order="left")
