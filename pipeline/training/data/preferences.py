"""The pairs and the labels that training reads, with their ways to sequences."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import polars as pl

from pipeline.ids import unit_interval
from pipeline.plan import ObjectiveConfig
from pipeline.store import Store, is_published, read
from schemas import LabelSequence, PreferenceLabel, Table, polars_schema


@dataclass(frozen=True)
class Preferences:
    """Pairs and labels; a way is a row's token ids under the one tokenisation.

    Attributes:
        pairs: `schemas.PreferencePair`.
        pair_sequences: `schemas.PairSequence`.
        labels: `schemas.PreferenceLabel`.
        label_sequences: `schemas.LabelSequence`.
    """

    pairs: pl.DataFrame
    pair_sequences: pl.DataFrame
    labels: pl.DataFrame
    label_sequences: pl.DataFrame

    def read_by(self, objective: ObjectiveConfig) -> "Preferences":
        """What an objective may read; the tables of the other kind are empty."""
        only = self if objective.reads_pairs else self._without("pairs", "pair_sequences")
        return only if objective.reads_labels else only._without("labels", "label_sequences")

    def of_splits(self, *splits: str) -> "Preferences":
        """Those of some splits that were tokenised."""
        pairs, labels = (
            table.filter(pl.col("split").is_in(splits)) for table in (self.pairs, self.labels)
        )
        return replace(self, pairs=pairs, labels=labels)._both_ways()

    def first(self, most: int | None, salt: str) -> "Preferences":
        """At most so many, pairs and labels together, always the same ones."""
        ids = [*self.pair_sequences["pair_id"], *self.label_sequences["label_id"]]
        if most is None or len(ids) <= most:
            return self
        kept = sorted(ids, key=partial(unit_interval, salt=salt))[:most]
        return replace(
            self,
            pair_sequences=self.pair_sequences.filter(pl.col("pair_id").is_in(kept)),
            label_sequences=self.label_sequences.filter(pl.col("label_id").is_in(kept)),
        )._both_ways()

    @property
    def ids(self) -> list[str]:
        """Of its pairs and labels."""
        return [*self.pairs["pair_id"], *self.labels["label_id"]]

    @property
    def sequence_ids(self) -> list[str]:
        """Of all their replies, some more than once."""
        ways = self.pair_sequences
        return [
            *ways["chosen_id"],
            *ways["rejected_id"],
            *self.label_sequences["sequence_id"],
        ]

    def _both_ways(self) -> "Preferences":
        """Rows that have a way, and ways that have a row."""
        return Preferences(
            *_met(self.pairs, self.pair_sequences, "pair_id"),
            *_met(self.labels, self.label_sequences, "label_id"),
        )

    def _without(self, *tables: str) -> "Preferences":
        return replace(self, **{name: getattr(self, name).clear() for name in tables})


def read_preferences(store: Store) -> Preferences:
    """A plan's pairs and labels as its intake and tokenisation have published them.

    Raises:
        StoreError: a table is missing or damaged.
    """
    return Preferences(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read_labels(store, "labels"),
        read_labels(store, "label_sequences"),
    )


def read_labels(store: Store, name: Literal["labels", "label_sequences"]) -> pl.DataFrame:
    """The labels, or their ways to sequences; empty where a plan's sources have none.

    Raises:
        StoreError: the table is damaged.
    """
    if is_published(store, name):
        return read(store, name)
    return pl.DataFrame(schema=polars_schema(_LABELS[name]))


def _met(rows: pl.DataFrame, ways: pl.DataFrame, key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    return rows.join(ways, on=key, how="semi"), ways.join(rows, on=key, how="semi")


_LABELS: Mapping[str, type[Table]] = {
    "labels": PreferenceLabel,
    "label_sequences": LabelSequence,
}
