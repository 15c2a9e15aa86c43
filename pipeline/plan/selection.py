"""What a plan trains on, said in SQL: `where` and `weight`, and what they may name.

An expression is over one table, `pairs`: a row is a pair, with the columns of `pairs`, its lengths
in tokens, and of every policy of the plan a column with its rewards, whose fields are named with a
dot (`theirs.margin`). All but the values follows from the columns alone, so that a wrong expression
is a wrong plan, and nothing is run.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.plan.faults import fault
from schemas import PairSequence, PreferencePair, Reward, Sequence, polars_schema

if TYPE_CHECKING:
    from pipeline.plan.sections import Plan

TABLE = "pairs"
"""What an expression's table is called."""

FROM_TOKENS = ("boundary_merge", "control_tokens")
"""The columns of `pair_sequences` that can be named."""

LENGTHS = {"n_prompt": "n_prompt", "n_chosen": "n_scored", "n_rejected": "n_scored"}
"""Lengths in tokens, and the column of `sequences` each is."""

_PAIR = polars_schema(PreferencePair)
_COLUMNS = {
    **_PAIR,
    **{name: polars_schema(Sequence)[column] for name, column in LENGTHS.items()},
    **{name: polars_schema(PairSequence)[name] for name in FROM_TOKENS},
}
_REWARDS = {name: dtype for name, dtype in polars_schema(Reward).items() if name != "pair_id"}


@dataclass(frozen=True)
class Sql:
    """An expression, and the key of the plan it stands under."""

    key: str
    text: str


@dataclass(frozen=True)
class Selection:
    """What decides which pairs an objective is trained on, and how much each counts."""

    where: Sql | None
    weight: Sql | None

    @property
    def expressions(self) -> tuple[Sql, ...]:
        """Those there are."""
        return tuple(sql for sql in (self.where, self.weight) if sql is not None)


def selection_of(plan: "Plan", objective: str) -> Selection:
    """An objective's own expressions, and the training's where it has none."""
    own, shared = plan.objectives[objective], plan.training

    def found(name: str) -> Sql | None:
        for key, said in ((f"objectives.{objective}", own), ("training", shared)):
            if (text := getattr(said, name)) is not None:
                return Sql(f"{key}.{name}", text)
        return None

    return Selection(found("where"), found("weight"))


def policies_named(plan: "Plan", objective: str) -> list[str]:
    """The objectives and audits whose rewards decide what an objective is trained on."""
    expressions = selection_of(plan, objective).expressions
    named = {name for sql in expressions for name in named_in(sql.text, plan.policies)}
    return [policy for policy in plan.policies if policy in named & set(plan.policies)]


def named_in(text: str, policies: Iterable[str]) -> list[str]:
    """The columns and policies that an expression cannot do without."""
    return list(_named_in(text, tuple(policies)))


@lru_cache(maxsize=256)
def _named_in(text: str, policies: tuple[str, ...]) -> tuple[str, ...]:
    columns = _columns(policies)

    return tuple(
        name
        for name in columns
        if name != "pair_id"
        and not _resolves(text, {k: v for k, v in columns.items() if k != name})
    )


def value_of(frame: pl.LazyFrame, text: str) -> pl.LazyFrame:
    """Columns `pair_id` and `value`: an expression of every row of `frame`, its table `pairs`.

    Raises:
        polars.exceptions.PolarsError: it is no SQL, or does not fit the columns; some of that
            shows only where the result is collected.
    """
    # On a line of its own, so that a comment at its end ends with it.
    query = f'SELECT pair_id, (\n{text}\n) AS "value" FROM {TABLE}'
    with pl.SQLContext({TABLE: frame}, eager=False) as context:
        return context.execute(query)


def shown(error: pl.exceptions.PolarsError) -> str:
    """Polars' complaint without its list of columns and its plan."""
    return str(error).strip().partition("\n")[0].partition("; valid columns")[0]


def require_selectable(plan: "Plan") -> None:
    """Refuse a plan whose expressions cannot be evaluated, or wait for each other.

    Raises:
        PydanticCustomError: names the key and what can be named.
    """
    said = [Sql(f"training.{name}", text) for name in ("where", "weight")
            if (text := getattr(plan.training, name)) is not None]  # fmt: skip
    for name in plan.objectives:
        said += selection_of(plan, name).expressions
    if not said:
        return
    for policy in plan.policies:
        if policy in (*_COLUMNS, TABLE):
            section = "objectives" if policy in plan.objectives else "audits"
            raise fault(
                f"{section}.{policy}",
                f"is called like what {said[0].key} may name; give it another name",
            )
    for sql in dict.fromkeys(said):
        _require_fitting(sql, tuple(plan.policies))
    for name, objective in plan.objectives.items():
        if objective.kl_partner == "batch_rotation" and (where := selection_of(plan, name).where):
            raise fault(
                f"objectives.{name}.kl_partner",
                "batch_rotation deals out partners before pairs are selected; "
                f"with {where.key} use ring",
            )
    _require_an_order(plan)


def _require_fitting(sql: Sql, policies: tuple[str, ...]) -> None:
    wanted = "a condition (Boolean)" if sql.key.endswith("where") else "a number"
    try:
        dtype = _dtype(sql.text, _columns(policies))
    except pl.exceptions.PolarsError as error:
        raise fault(sql.key, f"{shown(error)}; {_nameable(policies)}") from None
    fits = dtype == pl.Boolean if sql.key.endswith("where") else dtype.is_numeric()
    if not fits:
        raise fault(sql.key, f"is {wanted}, not {dtype}; {_nameable(policies)}")
    columns = _columns(policies)
    for policy in set(policies).intersection(named_in(sql.text, policies)):
        # Not one of its columns is missed where it has none of them.
        if _resolves(sql.text, {**columns, policy: pl.Struct({"none": pl.Float64})}):
            raise fault(sql.key, f"names {policy} without a column; {_nameable(policies)}")


def _require_an_order(plan: "Plan") -> None:
    """No objective waits for its own rewards, not by way of others either."""
    waits = {
        name: [
            policy
            for policy in (*policies_named(plan, name), objective.start, objective.reference)
            if policy in plan.objectives
        ]
        for name, objective in plan.objectives.items()
    }
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        ring: list[str] = error.args[1]
        # A ring of starts and references alone was refused before (`pipeline.plan.rounds`).
        first = next(
            sql
            for waiting, on in pairwise(reversed(ring))
            for sql in selection_of(plan, waiting).expressions
            if on in named_in(sql.text, plan.policies)
        )
        path = " <- ".join(reversed(ring))
        raise fault(
            first.key,
            f"'{ring[-1]}' would wait for its own rewards: {path}; an objective may name audits, "
            "and objectives that do not depend on it",
        ) from None


def _columns(policies: Iterable[str]) -> dict[str, pl.DataType]:
    rewards = pl.Struct(_REWARDS)
    return {**_COLUMNS, **dict.fromkeys(policies, rewards)}


def _resolves(text: str, columns: dict[str, pl.DataType]) -> bool:
    try:
        _dtype(text, columns)
    except pl.exceptions.PolarsError:
        return False
    return True


def _dtype(text: str, columns: dict[str, pl.DataType]) -> pl.DataType:
    """What an expression is over such columns.

    Of a row without values: what it compares Polars looks at only where there is a row, and of a
    list only where that is not NULL.
    """
    row: dict[str, list[Any]] = {
        n: [[] if isinstance(dtype, pl.List) else None] for n, dtype in columns.items()
    }
    found = value_of(pl.LazyFrame(row, schema=columns), text).collect()
    if found.columns != ["pair_id", "value"]:
        raise pl.exceptions.SQLSyntaxError("is more than one expression")
    return found.schema["value"]


def _nameable(policies: tuple[str, ...]) -> str:
    said = f"it may name {', '.join(_COLUMNS)}"
    if policies:
        said += f"; of {', '.join(policies)}, as in {policies[0]}.margin, {', '.join(_REWARDS)}"
    return said
