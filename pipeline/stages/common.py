"""What several stages need: the plan's limit of pairs, and the models' noise floor."""

from collections.abc import Iterator
from functools import partial

import polars as pl

from pipeline.ids import unit_interval
from pipeline.scoring.ledger import (
    ScorerKey,
    last_trust,
)
from pipeline.store import (
    Store,
    read_pieces,
)


def limited(pairs: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """At most `limit` pairs, always the same ones, whatever else is in the table."""
    if limit is None or pairs.height <= limit:
        return pairs
    return pairs.filter(pl.col("pair_id").is_in(_kept(pairs["pair_id"], limit)))


def limited_pieces(
    store: Store, limit: int | None, table: str = "pairs", key: str = "pair_id"
) -> Iterator[pl.DataFrame]:
    """The same pairs (or labels), some at a time."""
    kept = None
    if limit is not None:
        ids = [piece[key] for piece in read_pieces(store, table, columns=[key])]
        kept = _kept(pl.concat([pl.Series(key, [], pl.String), *ids]), limit)
    for piece in read_pieces(store, table):
        yield piece if kept is None else piece.filter(pl.col(key).is_in(kept))


def _kept(ids: pl.Series, limit: int) -> list[str]:
    return sorted(ids, key=partial(unit_interval, salt="limit"))[:limit]


def noise_floor(*keys: ScorerKey) -> float | None:
    """The larger of the models' noise floors, or None if one was not measured."""
    records = [last_trust(key) for key in keys]
    floors = [record["noise_floor"] for record in records if record is not None]
    return max(floors) if len(floors) == len(keys) else None
