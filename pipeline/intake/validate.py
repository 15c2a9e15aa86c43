"""Rules over pairs as read: the contract, flags, merging, the split and the row law."""

import pandera.errors
import polars as pl

from pipeline.ids import unit_interval
from pipeline.plan import SplitConfig
from schemas import InputRow, PairCandidate, PreferencePair, polars_schema, require_validation
from schemas.base import MESSAGES

CANDIDATE_SCHEMA = pl.Schema(
    {
        "source": pl.String(),
        "file": pl.String(),
        "row": pl.Int64(),
        "unit": pl.Int64(),
        "byte_offset": pl.Int64(),
        "raw": pl.String(),
        "prompt": MESSAGES,
        "chosen": pl.String(),
        "rejected": pl.String(),
        "strength": pl.Float64(),
        "meta": pl.String(),
        "pair_id": pl.String(),
        "reverse_id": pl.String(),
        "prompt_id": pl.String(),
        "evaluation": pl.Boolean(),
    }
)
"""A pair as read, with its place, and with the id it would have with its sides exchanged."""


def apply_contract(candidates: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split candidates into those that keep the contract and quarantine rows for the others.

    Every broken rule is named in `detail`; `rule` is the first.

    Raises:
        pandera.errors.SchemaErrors: a structural fault (a column or dtype), which is our own bug.
    """
    require_validation()
    columns = list(polars_schema(PairCandidate))
    try:
        PairCandidate.validate(candidates.select(columns), lazy=True)
    except pandera.errors.SchemaErrors as errors:
        broken = []
        for error in errors.schema_errors:
            if error.check_output is None:
                raise
            passed = error.check_output["check_output"]
            broken.append(pl.when(~passed).then(pl.lit(str(error.check.error))))
        marked = candidates.with_columns(
            pl.concat_list(broken).list.drop_nulls().alias("rules")
        ).with_columns(rule=pl.col("rules").list.first())
        rejected = marked.filter(pl.col("rule").is_not_null())
        quarantine = rejected.select(
            "source", "file", "row", "unit", "byte_offset", "rule",
            detail=pl.lit("breaks ") + pl.col("rules").list.join(", "),
            raw="raw",
        )  # fmt: skip
        return marked.filter(pl.col("rule").is_null()).drop("rules", "rule"), quarantine
    return candidates, pl.DataFrame()


def merge_pairs(candidates: pl.DataFrame, split: SplitConfig) -> pl.DataFrame:
    """Distinct pairs, sorted by `pair_id`; equal pairs become one with their votes and sources.

    `strength` is the mean over the votes that give one; `meta` and the place are the first vote's.
    A prompt that occurs in an evaluation source is never trained on, wherever else it occurs.
    """
    turns = pl.col("prompt").list.eval(pl.element().struct.field("role"))
    repeated = turns.list.eval((pl.element() == pl.element().shift(1)).fill_null(value=False))
    flags = {
        "role_repeated": repeated.list.any() | (turns.list.last() == "assistant"),
        "contradicted": pl.col("reverse_id").is_in(candidates["pair_id"].implode()),
    }
    merged = (
        candidates.with_columns(
            flags=pl.concat_list(
                [pl.when(found).then(pl.lit(name)) for name, found in flags.items()]
            ).list.drop_nulls()
        )
        .group_by("pair_id", maintain_order=True)
        .agg(
            pl.col("prompt_id", "prompt", "chosen", "rejected", "flags", "meta").first(),
            pl.col("file", "row", "byte_offset").first(),
            sources=pl.col("source").unique().sort(),
            strength=pl.col("strength").sort().mean(),  # sorted: a sum depends on its order
            votes=pl.len().cast(pl.Int64),
        )
    )
    evaluated = set(candidates.filter("evaluation")["prompt_id"])
    prompts = merged["prompt_id"].to_list()
    splits = ["evaluation" if p in evaluated else split_of(p, split) for p in prompts]
    return (
        merged.with_columns(split=pl.Series(splits, dtype=pl.String))
        .select(list(polars_schema(PreferencePair)))
        .sort("pair_id")
    )


def split_of(prompt_id: str, split: SplitConfig) -> str:
    """`train` or `test`, by the prompt's id alone: no row ever moves when others come or go."""
    return "test" if unit_interval(prompt_id, split.salt) < split.test_share else "train"


def prompts_in_two_splits(pairs: pl.DataFrame) -> int:
    """How many prompts stand in more than one split: 0, or training has seen the test."""
    per_prompt = pairs.group_by("prompt_id").agg(pl.col("split").n_unique())
    return per_prompt.filter(pl.col("split") > 1).height


def row_fates(read: pl.DataFrame, accepted: pl.DataFrame) -> pl.DataFrame:
    """What became of each input row.

    Args:
        read: every row that was read: `source, file, row, byte_offset`.
        accepted: the candidates that kept the contract, in reading order.
    """
    place = ["source", "file", "row"]
    units = accepted.with_columns(first=pl.col("pair_id").is_first_distinct())
    rows = units.group_by(place, maintain_order=True).agg(
        n_units=pl.len().cast(pl.Int64),
        new=pl.col("first").any(),
        pair_id=pl.col("pair_id").first(),
    )
    return (
        read.join(rows, on=place, how="left", maintain_order="left")
        .with_columns(
            disposition=pl.when(pl.col("new").is_null())
            .then(pl.lit("quarantined"))
            .when("new")
            .then(pl.lit("accepted"))
            .otherwise(pl.lit("merged")),
            n_units=pl.col("n_units").fill_null(0),
        )
        .with_columns(duplicate_of=pl.when(pl.col("disposition") == "merged").then("pair_id"))
        .select(list(polars_schema(InputRow)))
    )


def row_law(rows: pl.DataFrame, n_read: dict[str, int], pairs: pl.DataFrame) -> pl.DataFrame:
    """One row per source: n_in = n_accepted + n_merged + n_quarantined, and whether it holds.

    `n_read` is counted by the reader, not from `rows`. The units of all rows must also add up to
    the pairs' votes, that is to the pairs before merging; `holds` is false everywhere if not.
    """
    units_add_up = rows["n_units"].sum() == pairs["votes"].sum()
    fate = pl.col("disposition")
    counted = rows.group_by("source").agg(
        *[(fate == name).sum().cast(pl.Int64).alias(f"n_{name}") for name in
          ("accepted", "merged", "quarantined")],
    )  # fmt: skip
    read = pl.DataFrame(
        {"source": list(n_read), "n_in": list(n_read.values())},
        schema={"source": pl.String, "n_in": pl.Int64},
    )
    total = pl.sum_horizontal("n_accepted", "n_merged", "n_quarantined")
    return (
        read.join(counted, on="source", how="left", maintain_order="left")
        .with_columns(pl.col("n_accepted", "n_merged", "n_quarantined").fill_null(0))
        .with_columns(holds=(total == pl.col("n_in")) & pl.lit(units_add_up))
    )
