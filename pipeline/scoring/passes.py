"""Which sequences go through a model together.

The two replies of a pair share their prompt, so one forward pass over prompt, chosen and rejected
costs a third to a half less than two; so do the two mismatched replies under a pair's prompt. A
log-prob's last bits depend on the shape of its pass; for step 0 of training to be exactly 0,
scoring and training must cut passes alike. So the rule reads the tables alone: a pair whose
sequences are in no other pair and no label is one pass, and every other sequence is a pass of its
own.
"""

import polars as pl


def with_passes(
    sequences: pl.DataFrame,
    pair_sequences: pl.DataFrame,
    *kl: pl.DataFrame,
    labels: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The sequences with a column `pass_id`, null for those that go alone.

    Args:
        sequences: `schemas.Sequence`.
        pair_sequences: `schemas.PairSequence`, of one tokenisation.
        kl: `schemas.KlSequence`, a table for each objective that has one. A label's row has no
            `pair_id`, and its one reply goes alone.
        labels: `schemas.LabelSequence`; a label's reply goes alone.
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
    single = [] if labels is None else [labels.select(pl.lit(None).alias("pass_id"), "sequence_id")]
    members = pl.concat([sides, *mismatched, *single], how="vertical_relaxed")
    members = members.with_columns(alone=pl.len().over("sequence_id") == 1).drop_nulls("pass_id")
    shared = members.filter(pl.col("alone").all().over("pass_id")).drop("alone")
    return sequences.join(shared, on="sequence_id", how="left", maintain_order="left")
