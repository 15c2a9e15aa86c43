"""A loss over a whole table: the formula that trains, on the table's columns."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars as pl

from pipeline.losses.base import NEEDS, LossInputError, LossSpec, PairBatch, Statistics, Values

if TYPE_CHECKING:
    import torch

_SIDES = ("chosen", "rejected")


def table_columns(spec: LossSpec) -> list[str]:
    """The columns of a table that a loss reads, named as in `schemas.Reward`."""
    prefixes = ["policy", "n", *(["ref"] if spec.needs_reference else [])]
    return [*(f"{prefix}_{side}" for prefix in prefixes for side in _SIDES), *spec.columns]


def batch_of(frame: pl.DataFrame, *specs: LossSpec) -> PairBatch:
    """A table's columns as float64 tensors [rows].

    Args:
        frame: the columns of `table_columns`, log-probs in nats.
        specs: the losses that will read them, one at least.

    Raises:
        LossInputError: a column is missing, or holds a null, a NaN or an infinity.
    """
    import torch

    for spec in specs:
        if missing := [name for name in table_columns(spec) if name not in frame.columns]:
            reads = "; ".join(f"{need}: {NEEDS[need].what}" for need in spec.needs)
            raise LossInputError(
                f"{spec.name} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}, "
                f"which the table has not ({reads})"
            )
    wanted = list(dict.fromkeys(name for spec in specs for name in table_columns(spec)))
    numbers = frame.select(pl.col(wanted).cast(pl.Float64))
    finite = numbers.select(pl.all().is_finite().fill_null(value=False).all())
    if bad := [name for name in wanted if not finite[name].item() and numbers.height]:
        raise LossInputError(f"{', '.join(bad)}: not every row holds a finite number")
    columns = {name: numbers[name].to_torch() for name in wanted}
    nothing = torch.zeros_like(columns["policy_chosen"])
    return PairBatch(
        *(columns[f"policy_{side}"] for side in _SIDES),
        *(columns.get(f"ref_{side}", nothing) for side in _SIDES),
        *(columns[f"n_{side}"] for side in _SIDES),
        more={name: columns[name] for spec in specs for name in spec.columns},
    )


def complete(spec: LossSpec, values: Mapping[str, float] | None = None) -> dict[str, float]:
    """Values with the loss's defaults for those left out.

    Raises:
        LossInputError: a parameter the loss has not, or a value outside its bounds.
    """
    given = dict(values or {})
    for name, value in given.items():
        if name not in spec.parameters:
            has = ", ".join(spec.parameters) or "none"
            raise LossInputError(f"{spec.name} has no parameter '{name}'; it has {has}")
        if not spec.parameters[name].allows(value):
            raise LossInputError(
                f"{spec.name}: {name} {value} is outside its bounds: {spec.parameters[name]}"
            )
    return {**spec.defaults, **given}


def statistics_of(
    batch: PairBatch, spec: LossSpec, values: Values, known: Statistics | None = None
) -> Statistics:
    """What a loss must know of the whole table, beside what is known already.

    Raises:
        LossInputError: the loss needs `kl`, which no table of pairs tells, and it is not known.
    """
    known = dict(known or {})
    if spec.needs_kl and "kl" not in known:
        raise LossInputError(f"{spec.name} needs the statistic kl: {NEEDS['kl'].what}, nats")
    return known if spec.statistic is None else {**spec.statistic(batch, values, {}), **known}


def evaluate(
    frame: pl.DataFrame,
    spec: LossSpec,
    values: Mapping[str, float] | None = None,
    statistics: Statistics | None = None,
) -> pl.DataFrame:
    """Each row's loss, scores and gradient weight, in the table's order.

    Args:
        frame: see `batch_of`; a `schemas.Reward` table is one.
        spec: the loss.
        values: its parameters where not its defaults.
        statistics: what the loss must know of more than its pair; by default that of the table.

    Returns:
        `loss`, `score_chosen`, `score_rejected`, `gradient_weight`, float64.

    Raises:
        LossInputError: see `batch_of`, `complete`, `statistics_of`; or the numbers are so large
            that a result is not finite.
    """
    if not frame.height:
        return pl.DataFrame(schema=dict.fromkeys(_RESULTS, pl.Float64))
    complete_values = complete(spec, values)
    batch = batch_of(frame, spec)
    known = statistics_of(batch, spec, complete_values, statistics)
    results: list[torch.Tensor] = [
        spec.loss(batch, complete_values, known),
        *spec.scores(batch, complete_values),
        spec.gradient_weight(batch, complete_values, known),
    ]
    for name, column in zip(_RESULTS, results, strict=True):
        if not bool(column.isfinite().all()):
            raise LossInputError(f"{spec.name}: {name} is not finite in every row")
    return pl.DataFrame(
        {name: column.numpy() for name, column in zip(_RESULTS, results, strict=True)}
    )


_RESULTS = ("loss", "score_chosen", "score_rejected", "gradient_weight")
