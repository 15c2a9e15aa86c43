"""What the ledger's tests share: a fake scorer and sequences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from fake_engine import FAKE_NUMERICS, FakeEngine

from pipeline.models import Checkpoint, ModelIdentity
from pipeline.plan import Extra, ModelConfig, ScoringConfig
from pipeline.scoring.engines.base import Group, TokenScores
from pipeline.scoring.ledger import ScorerKey, append, read_logprobs, read_token_logprobs
from pipeline.scoring.run import ScoringResult, score_sequences
from pipeline.tokenization import sequence_id
from schemas import LogProb, TokenLogProb, polars_schema
from schemas import Sequence as SequenceTable

CONFIG = ModelConfig(checkpoint="none")
CHECKPOINT = Checkpoint(Path("/none"))
PROVENANCE = {"checkpoint": "c", "versions": "{}", "host": "h", "created_at": "now"}
A, B, C = "a" * 32, "b" * 32, "c" * 32


def fake_key(root: Path, model: str = "model") -> ScorerKey:
    return ScorerKey(root / "ledger", ModelIdentity(model, "{}", ""), FAKE_NUMERICS)


class FakeEngineWithExtras(FakeEngine):
    """A fake engine whose extras are made of its log-probs, and possible; it notes what it did."""

    def __init__(self, salt: str = "") -> None:
        super().__init__(salt)
        self.asked: list[tuple[tuple[Extra, ...], str]] = []

    def score_with_extras(
        self, groups: Sequence[Group], batch_tokens: int, extras: Sequence[Extra]
    ) -> list[list[TokenScores]]:
        self.asked += [(tuple(extras), c.sequence_id) for g in groups for c in g.completions]
        share: dict[Extra, float] = {"log_sum_squares": 0.5, "entropy": -1.5}
        return [
            [TokenScores(row, {e: np.float32(share[e]) * row for e in extras}) for row in rows]
            for rows in self.score(groups, batch_tokens)
        ]


def score(
    key: ScorerKey,
    sequences: pl.DataFrame,
    engine: FakeEngine | None = None,
    extras: Sequence[Extra] = (),
    **settings: Any,
) -> ScoringResult:
    used = engine or FakeEngineWithExtras()
    return score_sequences(
        "m",
        key,
        CONFIG,
        CHECKPOINT,
        sequences,
        ScoringConfig(**settings),
        lambda *_: used,
        extras,
    )


def rows(key: ScorerKey, values: dict[str, float]) -> tuple[pl.DataFrame, pl.DataFrame]:
    scorer = {"model_id": key.model.model_id, "numerics_id": FAKE_NUMERICS.numerics_id}
    sums = [{**scorer, "sequence_id": i, "logprob": v, "n_tokens": 1} for i, v in values.items()]
    tokens = [{**scorer, "sequence_id": i, "logprobs": [v]} for i, v in values.items()]
    return (
        pl.DataFrame(sums, schema=polars_schema(LogProb)),
        pl.DataFrame(tokens, schema=polars_schema(TokenLogProb)),
    )


def put(key: ScorerKey, **values: float) -> None:
    """Commit some sums; a name of one letter stands for an id of 32."""
    append(key, *rows(key, {name * 32: value for name, value in values.items()}), PROVENANCE)


def held(key: ScorerKey) -> dict[str, float]:
    """What is read, by the first letter of the id."""
    return {i[0]: value for i, value in read_logprobs(key).select(ID_AND_SUM).iter_rows()}


ID_AND_SUM = ["sequence_id", "logprob"]


def everything(key: ScorerKey) -> pl.DataFrame:
    """The ledger in canonical order, token by token."""
    return read_logprobs(key).join(read_token_logprobs(key), on="sequence_id").sort("sequence_id")


def made_sequences(n_prompts: int, seed: int = 0) -> pl.DataFrame:
    """A `sequences` table, two replies to a prompt; quick enough for ten thousand of them."""
    generator = np.random.default_rng(seed)
    table = []
    for _ in range(n_prompts):
        prompt = generator.integers(3, 300, generator.integers(3, 20)).astype(np.int32)
        for _ in range(2):
            ids = generator.integers(3, 300, generator.integers(2, 12)).astype(np.int32)
            table.append(
                {
                    "sequence_id": sequence_id(prompt, ids, [(0, len(ids))]),
                    "prompt_ids": prompt.tolist(),
                    "completion_ids": ids.tolist(),
                    "spans": [{"start": 0, "end": len(ids)}],
                    "n_prompt": len(prompt),
                    "n_scored": len(ids),
                    "truncated": False,
                }
            )
    return pl.DataFrame(table, schema=polars_schema(SequenceTable)).sort("sequence_id")
