"""Which of the training split's pairs are trained on, and how much each of them counts."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from pipeline.errors import TrainingError
from pipeline.names import policy_id_of
from pipeline.plan import Plan, Selection, Sql, policies_named, selection_of
from pipeline.plan.selection import FROM_TOKENS, LENGTHS, named_in, shown, value_of
from pipeline.store import Store, current_snapshot, read

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectionRecord:
    """What a plan's expressions came to.

    Attributes:
        where: the condition; None for every pair.
        weight: the weight; None for 1.
        n: tokenised pairs of the training split.
        n_selected: those that are trained on.
        n_left_out: those the condition is false of.
        n_null: those it is neither true nor false of, which are left out too.
        null_in: of `n_null`, by each column or policy that the condition names, how many pairs
            have nothing there; of a policy: no reward.
        rewards: the snapshot of each policy's rewards that was read.
        lightest: the least weight of a pair that is trained on.
        heaviest: the largest.
    """

    where: str | None
    weight: str | None
    n: int
    n_selected: int
    n_left_out: int
    n_null: int
    null_in: dict[str, int]
    rewards: dict[str, str]
    lightest: float
    heaviest: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)

    def __str__(self) -> str:
        """For instance `120 of 172 pairs, 40 left out, 12 NULL (12 without theirs)`."""
        said = f"{self.n_selected} of {self.n} pairs"
        if self.where is not None:
            said += f", {self.n_left_out} left out, {self.n_null} NULL"
        if self.null_in:
            said += f" ({', '.join(f'{n} without {name}' for name, n in self.null_in.items())})"
        if self.weight is not None:
            said += f", weights {self.lightest:g} to {self.heaviest:g}"
        return said


@dataclass(frozen=True)
class Selected:
    """The pairs that are trained on.

    Attributes:
        pair_ids: sorted.
        weights: by pair id; empty where all count the same.
        record: how it came to them.
    """

    pair_ids: list[str]
    weights: dict[str, float]
    record: SelectionRecord

    def of(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows of a table with a column `pair_id` that are of these pairs."""
        return frame.filter(pl.col("pair_id").is_in(self.pair_ids))


def selected_pairs(plan: Plan, store: Store, name: str) -> Selected:
    """What an objective is trained on, by the plan and the published tables.

    Raises:
        TrainingError: an expression fails, selects nothing or gives no weight; or the rewards it
            names are of other pairs, or of an earlier policy, than there are now.
        StoreError: rewards it names were never computed.
    """
    named = policies_named(plan, name)
    for policy in named:
        _require_recent(plan, store, policy)
    selected = select_pairs(
        selection_of(plan, name),
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read(store, "sequences"),
        {policy: read(store, f"rewards/{policy}") for policy in named},
        {policy: current_snapshot(store, f"rewards/{policy}").digest for policy in named},
    )
    record = selected.record
    if record.where is not None or record.weight is not None:
        _log.info("objective '%s' is trained on %s", name, record)
    if plan.scoring.train_pairs is not None and any(record.null_in.get(p) for p in named):
        _log.warning(
            "objective '%s': scoring.train_pairs is %d, so that most training pairs have no "
            "rewards and are not selected",
            name,
            plan.scoring.train_pairs,
        )
    return selected


def select_pairs(
    selection: Selection,
    pairs: pl.DataFrame,
    pair_sequences: pl.DataFrame,
    sequences: pl.DataFrame,
    rewards: Mapping[str, pl.DataFrame],
    digests: Mapping[str, str] | None = None,
) -> Selected:
    """The tokenised pairs of the training split of which `where` is true, with their weights.

    As in SQL, a pair of which it is NULL is not selected, and `weight` sees the selected pairs
    only (which matters to window functions).

    Args:
        selection: the expressions.
        pairs: `schemas.PreferencePair`.
        pair_sequences: `schemas.PairSequence`, of one tokenisation.
        sequences: `schemas.Sequence`.
        rewards: `schemas.Reward` by policy, of those that are named.
        digests: their snapshots, for the record.

    Raises:
        TrainingError: an expression fails on a value, nothing is selected, or a weight is NULL or
            no number above 0.
    """
    table = _table(pairs, pair_sequences, sequences, rewards)
    chosen, verdict = table, pl.Series([True] * table.height, dtype=pl.Boolean)
    null_in: dict[str, int] = {}
    if (where := selection.where) is not None:
        verdict = _values(table, where)
        null = table.filter(verdict.is_null())
        lacking = {name: null[name].null_count() for name in named_in(where.text, rewards)}
        null_in = {name: n for name, n in lacking.items() if n}
        chosen = table.filter(verdict.fill_null(value=False))
    weights: dict[str, float] = {}
    if selection.weight is not None:
        values = _weights(chosen, selection.weight)
        weights = dict(zip(chosen["pair_id"], values, strict=True))
    record = SelectionRecord(
        where=None if where is None else where.text,
        weight=None if selection.weight is None else selection.weight.text,
        n=table.height,
        n_selected=chosen.height,
        n_left_out=int((~verdict).sum()),
        n_null=verdict.null_count(),
        null_in=null_in,
        rewards=dict(digests or {}),
        lightest=min(weights.values(), default=1.0),
        heaviest=max(weights.values(), default=1.0),
    )
    if where is not None and chosen.is_empty() and not table.is_empty():
        raise TrainingError(f"{where.key}: selects nothing: {record}")
    return Selected(chosen["pair_id"].to_list(), weights, record)


def _table(
    pairs: pl.DataFrame,
    pair_sequences: pl.DataFrame,
    sequences: pl.DataFrame,
    rewards: Mapping[str, pl.DataFrame],
) -> pl.DataFrame:
    """A row is a tokenised pair of the training split, with all that can be named of it."""
    ids = ["chosen_id", "rejected_id"]
    table = pairs.filter(split="train").join(
        pair_sequences.select("pair_id", *ids, *FROM_TOKENS), on="pair_id"
    )
    for length, column in LENGTHS.items():
        side = "rejected_id" if length == "n_rejected" else "chosen_id"
        lengths = sequences.select(pl.col("sequence_id").alias(side), pl.col(column).alias(length))
        table = table.join(lengths, on=side, how="left")
    for policy, rows in rewards.items():
        fields = pl.struct(pl.exclude("pair_id")).alias(policy)
        table = table.join(rows.select("pair_id", fields), on="pair_id", how="left")
    return table.drop(ids).sort("pair_id")


def _values(table: pl.DataFrame, sql: Sql) -> pl.Series:
    """An expression's values, in the table's order."""
    try:
        found = value_of(table.lazy(), sql.text).collect()
    except pl.exceptions.PolarsError as error:
        raise TrainingError(f"{sql.key}: {shown(error)}") from error
    # One that closes our bracket and goes on with a WHERE of its own.
    if found.height != table.height or found["pair_id"].is_duplicated().any():
        raise TrainingError(f"{sql.key}: gives {found.height} values of {table.height} pairs")
    return table.select("pair_id").join(found, on="pair_id", how="left")["value"]


def _weights(chosen: pl.DataFrame, sql: Sql) -> pl.Series:
    """The pairs' weights, each a number above 0."""
    values = _values(chosen, sql).cast(pl.Float64)
    bad = chosen.select("pair_id", weight=values).filter(
        ~(pl.col("weight").is_finite() & (pl.col("weight") > 0)).fill_null(value=False)
    )
    if not bad.is_empty():
        first, value = bad.row(0)
        raise TrainingError(
            f"{sql.key}: is {'NULL' if value is None else value} for pair {first}, one of "
            f"{bad.height} (of {chosen.height}) where it is no number above 0; COALESCE gives what "
            f"is NULL a weight, and {sql.key.replace('weight', 'where')} leaves a pair out"
        )
    return values


def _require_recent(plan: Plan, store: Store, policy: str) -> None:
    """Refuse rewards from before the pairs, or the policy they are of, were made anew."""
    rewards = read(store, f"rewards/{policy}")
    stale = None
    if set(rewards["pairs_digest"]) - {current_snapshot(store, "pairs").digest}:
        stale = "an earlier snapshot of pairs"
    elif policy in plan.objectives and set(rewards["policy_id"]) - {policy_id_of(store, policy)}:
        stale = "an earlier policy"
    if stale is not None:
        raise TrainingError(
            f"the rewards of '{policy}', which the selection names, are of {stale}; compute them "
            f"anew (implicit_rewards_{policy})"
        )
