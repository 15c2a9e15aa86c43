"""How far two numerics of one model are apart, from the sequences that both have scored.

After an upgrade of an engine only the numerics of a scorer change. What is scored then is compared
with what earlier numerics say of the same sequences, and the difference is kept on record.
"""

import json
from dataclasses import asdict, dataclass, fields

import polars as pl

from pipeline.locks import locked
from pipeline.scoring.engines.base import Numerics
from pipeline.scoring.ledger.commits import ScorerKey, read_logprobs
from pipeline.scoring.ledger.manifests import FOLDER, present
from pipeline.store import commit_numbered

DIFFERENCES = "differences"


@dataclass(frozen=True)
class Difference:
    """Absolute differences from other numerics, nats per sequence, over `n` sequences."""

    numerics_id: str
    n: int
    mean: float
    largest: float


def other_numerics(key: ScorerKey) -> list[ScorerKey]:
    """The same model's scorers in other numerics, in order of their ids."""
    found = []
    for path in sorted((key.ledger / key.model.model_id).glob(f"*/{FOLDER}")):
        commits = present(path.parent)
        if path.parent != key.directory and commits:
            said = {field.name: commits[0].scorer[field.name] for field in fields(Numerics)}
            found.append(ScorerKey(key.ledger, key.model, Numerics(**said)))
    return found


def record_differences(key: ScorerKey) -> None:
    """Compare a scorer with its model's other numerics; record where more is known than before.

    Raises:
        StoreError: the disk failed.
    """
    mine = read_logprobs(key)
    for other in other_numerics(key):
        theirs = read_logprobs(other).select("sequence_id", other="logprob")
        both = mine.join(theirs, on="sequence_id")
        known = recorded_difference(key, other)
        if both.height <= (known.n if known else 0):
            continue
        apart = both.select((pl.col("logprob") - pl.col("other")).abs()).to_series()
        found = Difference(
            other.numerics.numerics_id,
            both.height,
            float(apart.sum()) / both.height,
            float(apart.to_numpy().max()),
        )
        with locked(key.directory):
            commit_numbered(
                key.directory / DIFFERENCES, json.dumps(asdict(found)).encode(), ".json"
            )


def recorded_difference(key: ScorerKey, other: ScorerKey) -> Difference | None:
    """What was recorded last about these two, or None."""
    for path in sorted((key.directory / DIFFERENCES).glob("*.json"), reverse=True):
        found = Difference(**json.loads(path.read_text()))
        if found.numerics_id == other.numerics.numerics_id:
            return found
    return None
