"""What became of each input row, and the law that none is lost."""

from collections import Counter
from collections.abc import Mapping

import polars as pl

from pipeline.intake.rows.units import LABEL, PAIR
from pipeline.rules import RULES
from schemas import InputRow, QuarantinedRow, polars_schema
from schemas.intake import DISPOSITIONS

PLACE_SCHEMA = pl.Schema(
    {
        "ordinal": pl.UInt64(),
        "source": pl.String(),
        "file": pl.String(),
        "row": pl.Int64(),
        "byte_offset": pl.Int64(),
        "raw": pl.String(),
    }
)
"""A row that was read; `raw` is its beginning."""


def row_states(fates: pl.DataFrame) -> pl.DataFrame:
    """One row per input row that gave something: `ordinal, n_units, new, kind, id`, sorted.

    Args:
        fates: `pipeline.intake.prompts.merge.FATE_SCHEMA`.
    """
    return (
        fates.sort("ordinal", "unit")
        .group_by("ordinal", maintain_order=True)
        .agg(
            n_units=pl.col("counted").sum().cast(pl.Int64),
            new=pl.col("first").any(),
            kind=pl.col("kind").first(),
            id=pl.col("id").first(),
        )
    )


def row_fates(read: pl.DataFrame, states: pl.DataFrame) -> pl.DataFrame:
    """What became of some input rows, as `schemas.InputRow`.

    Args:
        read: the rows, as `PLACE_SCHEMA`.
        states: what `row_states` says of them; a row that gave nothing was quarantined.
    """
    named = pl.col("id").bin.encode("hex")
    merged = pl.col("disposition") == "merged"
    return (
        read.join(states, on="ordinal", how="left", maintain_order="left")
        .with_columns(
            disposition=pl.when(pl.col("new").is_null())
            .then(pl.lit("quarantined"))
            .when("new")
            .then(pl.lit("accepted"))
            .otherwise(pl.lit("merged")),
            n_units=pl.col("n_units").fill_null(0),
            pair_id=pl.when(pl.col("kind") == PAIR).then(named),
            label_id=pl.when(pl.col("kind") == LABEL).then(named),
        )
        .with_columns(duplicate_of=pl.when(merged).then(pl.coalesce("pair_id", "label_id")))
        .select(list(polars_schema(InputRow)))
    )


def quarantined(read: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """Rejected units as `schemas.QuarantinedRow`, by row and unit.

    Args:
        read: the rows they are of, as `PLACE_SCHEMA`.
        rejected: `pipeline.intake.rows.contract.REJECTED_SCHEMA`.
    """
    versions = pl.DataFrame(
        {"rule": list(RULES), "rule_version": [rule.version for rule in RULES.values()]},
        schema={"rule": pl.String, "rule_version": pl.Int64},
    )
    return (
        rejected.join(versions, on="rule", how="left")
        .join(read, on="ordinal", how="left")
        .with_columns(pl.col("unit").cast(pl.Int64))
        .sort("ordinal", "unit")
        .select(list(polars_schema(QuarantinedRow)))
    )


def count_fates(rows: pl.DataFrame) -> Counter[tuple[str, str]]:
    """Rows by (source, disposition), and their units under (source, `n_units`)."""
    counted = Counter(
        {(s, d): n for s, d, n in rows.group_by("source", "disposition").len().rows()}
    )
    units = rows.group_by("source").agg(pl.col("n_units").sum())
    counted.update({(source, "n_units"): n for source, n in units.iter_rows()})
    return counted


def row_law(
    counted: Mapping[tuple[str, str], int], n_read: Mapping[str, int], n_votes: int
) -> pl.DataFrame:
    """One row per source: n_in = n_accepted + n_merged + n_quarantined, and whether it holds.

    Args:
        counted: `count_fates` of the whole published table.
        n_read: rows of each source as its reader counted them, not from the table.
        n_votes: votes of all pairs and labels, that is, how many there were before merging; where
            the table's units do not add up to it, the law is broken everywhere.
    """
    units_add_up = sum(n for (_, what), n in counted.items() if what == "n_units") == n_votes
    law = []
    for source, n_in in n_read.items():
        fates = {f"n_{fate}": counted.get((source, fate), 0) for fate in DISPOSITIONS}
        holds = sum(fates.values()) == n_in and units_add_up
        law.append({"source": source, "n_in": n_in, **fates, "holds": holds})
    integers = ["n_in", *(f"n_{fate}" for fate in DISPOSITIONS)]
    return pl.DataFrame(
        law,
        schema={"source": pl.String, **dict.fromkeys(integers, pl.Int64), "holds": pl.Boolean},
    )
