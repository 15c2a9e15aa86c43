"""Whole tables of pairs or labels to their sequences, in memory or past it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import polars as pl

from pipeline.tokenization.encoder import Encoder
from pipeline.tokenization.sorting import SEQUENCE_ORDER, distinct
from pipeline.tokenization.tables import LABELS, PAIRS, Rows, tokenized
from schemas import Sequence, polars_schema


@dataclass(frozen=True)
class Ways:
    """The ways of rows to their sequences, and the rows that have none, each sorted by id."""

    ways: pl.DataFrame
    untokenized: pl.DataFrame


@dataclass(frozen=True)
class SequenceTables:
    """`sequences`, `pair_sequences`, `untokenized_pairs` and the one-row `tokenizations`."""

    sequences: pl.DataFrame
    pair_sequences: pl.DataFrame
    untokenized: pl.DataFrame
    tokenization: pl.DataFrame


@dataclass(frozen=True)
class LabelTables:
    """`sequences`, `label_sequences`, `untokenized_labels` and the one-row `tokenizations`."""

    sequences: pl.DataFrame
    label_sequences: pl.DataFrame
    untokenized: pl.DataFrame
    tokenization: pl.DataFrame


def pair_ways(
    pairs: Iterable[pl.DataFrame], encoder: Encoder, take: Callable[[pl.DataFrame], None]
) -> Ways:
    """Tokenise pairs, a frame at a time, and hand over their sequences (some more than once).

    Args:
        pairs: parts of the `pairs` table.
        encoder: tokeniser, template and settings.
        take: is given rows of `schemas.Sequence`, as they come.

    Raises:
        ModelError: the template shows the date, or breaks its limits over and over.
    """
    return _ways(pairs, encoder, take, PAIRS)


def label_ways(
    labels: Iterable[pl.DataFrame], encoder: Encoder, take: Callable[[pl.DataFrame], None]
) -> Ways:
    """The same for parts of the `labels` table."""
    return _ways(labels, encoder, take, LABELS)


def tokenize_pairs(pairs: pl.DataFrame, encoder: Encoder) -> SequenceTables:
    """Every pair's two sequences, each distinct one once, sorted by id.

    Args:
        pairs: the `pairs` table (or a part of it).
        encoder: tokeniser, template and settings.

    Raises:
        ModelError: the template shows the date, or breaks its limits over and over.
    """
    taken: list[pl.DataFrame] = []
    ways = pair_ways([pairs], encoder, taken.append)
    return SequenceTables(_distinct(taken), ways.ways, ways.untokenized, encoder.identity())


def tokenize_labels(labels: pl.DataFrame, encoder: Encoder) -> LabelTables:
    """Every label's sequence, each distinct one once, sorted by id."""
    taken: list[pl.DataFrame] = []
    ways = label_ways([labels], encoder, taken.append)
    return LabelTables(_distinct(taken), ways.ways, ways.untokenized, encoder.identity())


def _ways(
    frames: Iterable[pl.DataFrame],
    encoder: Encoder,
    take: Callable[[pl.DataFrame], None],
    rows: Rows,
) -> Ways:
    ways = [pl.DataFrame(schema=polars_schema(rows.way_table))]
    lost = [pl.DataFrame(schema=polars_schema(rows.lost_table))]
    for part in tokenized(frames, encoder, rows):
        take(part.sequences)
        ways.append(part.ways)
        lost.append(part.lost)
    return Ways(*[pl.concat(parts).sort(rows.key) for parts in (ways, lost)])


def _distinct(frames: list[pl.DataFrame]) -> pl.DataFrame:
    rows = pl.concat([pl.DataFrame(schema=polars_schema(Sequence)), *frames])
    return distinct(rows, SEQUENCE_ORDER)
