"""A table to publish, and the names of the files that came of it."""

import polars as pl

from pipeline.store import Store
from schemas import LogProb, polars_schema


def logprobs(n: int = 50, first: float = -1.5) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "model_id": ["a" * 32] * n,
            "numerics_id": ["b" * 32] * n,
            "sequence_id": [f"{i:032x}" for i in range(n)],
            "logprob": [first - i / 7 for i in range(n)],
            "n_tokens": [i + 1 for i in range(n)],
        },
        schema=polars_schema(LogProb),
    )


def files(store: Store, name: str = "logprobs") -> set[str]:
    return {path.name for path in (store.directory / name).iterdir()}
