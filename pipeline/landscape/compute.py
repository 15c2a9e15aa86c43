"""What each loss, with each of its settings, makes of a fixed policy's log-probs.

Nothing is trained: a row says what a loss would pull on if its training began at this policy, not
where it would end.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from pipeline.losses import REGISTRY, LossInputError, LossSpec, PairBatch, Statistics
from pipeline.losses.table import batch_of, complete, statistics_of, table_columns
from schemas import LossLandscape, polars_schema

if TYPE_CHECKING:
    import torch

CHUNK_ROWS = 16_384
"""Rows at a time: what a core's cache holds, and too few for torch to split among threads."""

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
_SATURATED = 0.01


@dataclass(frozen=True)
class _Question:
    spec: LossSpec
    values: dict[str, float]


def answerable(columns: Iterable[str], statistics: Iterable[str] = ()) -> list[str]:
    """The losses of the registry that a table with these columns can be asked about.

    Args:
        columns: the table's, as in `schemas.Reward`.
        statistics: what is known beside it: `kl`, for KTO.
    """
    there, known = set(columns), set(statistics)
    return [
        name
        for name, spec in REGISTRY.items()
        if there.issuperset(table_columns(spec)) and (not spec.needs_kl or "kl" in known)
    ]


def landscape(
    table: pl.DataFrame | pl.LazyFrame,
    losses: Sequence[str | LossSpec],
    grid: Mapping[str, Sequence[float]],
    *,
    statistics: Statistics | None = None,
    threads: int | None = None,
) -> pl.DataFrame:
    """Ask every loss with every setting of the grid it has; `schemas.LossLandscape` but its ids.

    A loss takes from the grid the parameters it has, each combination once, and its defaults for
    the others. A loss of a pair among others (`needs_batch`) takes the whole table for its batch.

    Args:
        table: policy and reference sums in nats and tokens, `policy_chosen`, `policy_rejected`,
            `ref_*`, `n_*`, as in `schemas.Reward`; more columns for the losses that need them.
        losses: names of the registry, or losses of one's own (`weighted_sum`).
        grid: values by parameter, for instance `{"beta": [0.05, 0.1], "gamma": [0.5, 1.0]}`.
        statistics: what is known beside the table: `kl`, for KTO.
        threads: settings computed side by side; by default one per core.

    Returns:
        One row per loss and setting, in the order asked.

    Raises:
        LossInputError: an unknown loss, a parameter none of them has, a value outside its bounds,
            a column that is missing or not finite, or a result that is not finite.
    """
    questions = list(_questions(losses, grid))
    schema = {k: v for k, v in polars_schema(LossLandscape).items() if k not in _IDS}
    specs = [question.spec for question in questions]
    wanted = {column for spec in specs for column in table_columns(spec)}
    there = set(table.lazy().collect_schema())
    frame = table.lazy().select(sorted(wanted & there)).collect()
    if not questions or not frame.height:
        return pl.DataFrame(schema=schema)
    batch = batch_of(frame, *specs)
    del frame
    answer = partial(_answer, batch, dict(statistics or {}))
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        rows = list(pool.map(answer, questions))
    return pl.DataFrame(rows, schema=schema)


def _questions(
    losses: Sequence[str | LossSpec], grid: Mapping[str, Sequence[float]]
) -> Iterator[_Question]:
    specs = []
    for loss in losses:
        if isinstance(loss, str) and loss not in REGISTRY:
            raise LossInputError(f"'{loss}' is not one of {', '.join(REGISTRY)}")
        specs.append(REGISTRY[loss] if isinstance(loss, str) else loss)
    for parameter in grid:
        if not any(parameter in spec.parameters for spec in specs):
            raise LossInputError(f"none of the losses has the parameter '{parameter}'")
    for spec in specs:
        own = [parameter for parameter in grid if parameter in spec.parameters]
        for values in product(*(grid[parameter] for parameter in own)):
            yield _Question(spec, complete(spec, dict(zip(own, values, strict=True))))


def _answer(batch: PairBatch, known: Statistics, question: _Question) -> dict[str, Any]:
    """One row: the table is gone through in chunks, unless the loss takes it whole."""
    spec, values = question.spec, question.values
    statistics = statistics_of(batch, spec, values, known)
    n = len(batch.policy_chosen)
    weights = np.empty(n)
    total = 0.0
    step = n if spec.needs_batch else CHUNK_ROWS
    for start in range(0, n, step):
        part = batch if step == n else _rows(batch, slice(start, start + step))
        total += spec.loss(part, values, statistics).sum().item()
        weight = spec.gradient_weight(part, values, statistics)
        weights[start : start + step] = weight.numpy()
    at_rest = _weight_at_rest(spec, values)
    mean, squares = float(weights.mean()), float(np.dot(weights, weights))
    if not np.isfinite([total, mean, squares]).all():
        said = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise LossInputError(f"{spec.name} ({said}): not every row has a finite loss and weight")
    effective = (n * mean) ** 2 / squares if squares > 0 else 0.0
    saturated = float((weights < _SATURATED * at_rest).mean())
    return {
        "loss": spec.name,
        "values": " ".join(f"{name}={value:g}" for name, value in values.items()),
        **{name: values.get(name) for name in ("beta", "gamma", "tau", "label_smoothing")},
        "n_pairs": n,
        "mean_loss": total / n,
        "weight_mean": mean,
        **{f"weight_{name}": q for name, q in _quantiles(weights).items()},
        "weight_max": float(weights.max()),
        "effective_pairs": effective,
        "effective_share": effective / n,
        "saturated_share": saturated,
    }


def _rows(batch: PairBatch, rows: slice) -> PairBatch:
    columns = {f.name: getattr(batch, f.name)[rows] for f in fields(batch) if f.name != "more"}
    return PairBatch(**columns, more={name: column[rows] for name, column in batch.more.items()})


def _weight_at_rest(spec: LossSpec, values: Mapping[str, float]) -> float:
    """The weight of a pair the policy has not moved on, both replies being equally likely.

    One token each, at -1 nat under policy and reference, and a strength of 1.
    """
    import torch

    def full(number: float) -> "torch.Tensor":
        return torch.full((1,), number, dtype=torch.float64)

    one_token, one = full(-1.0), full(1.0)
    more = {column: full(0.0) for column in spec.columns}
    more |= {column: one_token for column in spec.columns if "_prefix_" in column}
    more |= {column: one for column in spec.columns if column in ("strength", "n_gold")}
    pair = PairBatch(one_token, one_token, one_token, one_token, one, one, more=more)
    statistics = statistics_of(pair, spec, values, {"kl": 0.0})
    return spec.gradient_weight(pair, values, statistics).item()


def _quantiles(weights: np.ndarray) -> dict[str, float]:
    """Exact sample quantiles, nearest rank: the smallest weight that this share does not exceed."""
    n = len(weights)
    ranks = [max(0, int(np.ceil(share * n)) - 1) for share in QUANTILES.values()]
    found = np.partition(weights, sorted(set(ranks)))[ranks]
    return dict(zip(QUANTILES, found.tolist(), strict=True))


_IDS = ("policy", "policy_id", "rewards_digest")
