"""Tables of the ledger: who scored, and what came out. All log-probs are in nats."""

import pandera.polars as pa
import polars as pl

from schemas.base import ID, Table

EXTRAS = ["log_sum_squares", "entropy"]
"""Of a token's distribution p over the vocabulary: log sum_v p(v)^2, -sum_v p(v) log p(v)."""

EXTRA_KEY = ["sequence_id", "extra"]


class Scorer(Table):
    """One row is a way of scoring: a model under one numerics.

    A field marked `identity` is hashed into `model_id` or `numerics_id`: another value is another
    scorer. A field marked `provenance` only says how the numbers came about.
    """

    model_id: str = pa.Field(str_matches=ID)
    numerics_id: str = pa.Field(str_matches=ID)
    weights: str = pa.Field(
        metadata={"role": "identity", "of": "model"}, description="BLAKE3 of each weight file."
    )
    config: str = pa.Field(
        metadata={"role": "identity", "of": "model"}, description="config.json, canonical."
    )
    adapter: str = pa.Field(
        metadata={"role": "identity", "of": "model"},
        description="BLAKE3 of the adapter's weights and its canonical config; empty for none.",
    )
    logprob_definition: int = pa.Field(
        metadata={"role": "identity", "of": "model"},
        description="Version of what 'log-prob' means here.",
    )
    engine: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    engine_version: str = pa.Field(
        metadata={"role": "identity", "of": "numerics"}, description="major.minor"
    )
    modeling_version: str = pa.Field(
        metadata={"role": "identity", "of": "numerics"},
        description="Library that holds the model's forward pass, major.minor.",
    )
    runner: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    body_dtype: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    head_dtype: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    cache_dtype: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    attention_backend: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    quantisation: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    prefix_reuse: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    tensor_parallel: int = pa.Field(metadata={"role": "identity", "of": "numerics"})
    pipeline_parallel: int = pa.Field(metadata={"role": "identity", "of": "numerics"})
    batch_invariant: bool = pa.Field(metadata={"role": "identity", "of": "numerics"})
    device_class: str = pa.Field(metadata={"role": "identity", "of": "numerics"})
    adapter_mode: str = pa.Field(
        metadata={"role": "identity", "of": "numerics"},
        isin=["none", "applied", "merged"],
    )
    checkpoint: str = pa.Field(metadata={"role": "provenance"})
    versions: str = pa.Field(metadata={"role": "provenance"}, description="Full versions, JSON.")
    host: str = pa.Field(metadata={"role": "provenance"})
    created_at: str = pa.Field(metadata={"role": "provenance"}, description="UTC, ISO 8601.")
    shared_prompts: bool = pa.Field(
        nullable=True,
        metadata={"role": "provenance"},
        description="Prompts were computed once for all their completions.",
    )
    shared_prompts_reason: str = pa.Field(
        nullable=True, metadata={"role": "provenance"}, description="Why not; empty if they were."
    )


def identity_fields(of: str) -> list[str]:
    """The columns of `Scorer` that make the id of a `model` or of a `numerics`, in table order."""
    columns = Scorer.to_schema().columns
    return [name for name, column in columns.items() if (column.metadata or {}).get("of") == of]


class LogProb(Table):
    """One row is a scored sequence."""

    model_id: str = pa.Field(str_matches=ID)
    numerics_id: str = pa.Field(str_matches=ID)
    sequence_id: str = pa.Field(unique=True, str_matches=ID)
    logprob: float = pa.Field(description="float64 sum over the scored tokens, nats.")
    n_tokens: int = pa.Field(ge=1, description="Scored tokens.")


class TokenLogProb(Table):
    """One row is a scored sequence's log-probs token by token, nats."""

    model_id: str = pa.Field(str_matches=ID)
    numerics_id: str = pa.Field(str_matches=ID)
    sequence_id: str = pa.Field(unique=True, str_matches=ID)
    logprobs: pl.List(pl.Float32)  # type: ignore[valid-type]


class SequenceExtra(Table):
    """One row is what was asked of a scored sequence's tokens beside their log-probs, added up."""

    model_id: str = pa.Field(str_matches=ID)
    numerics_id: str = pa.Field(str_matches=ID)
    sequence_id: str = pa.Field(str_matches=ID)
    extra: str = pa.Field(isin=EXTRAS)
    total: float = pa.Field(description="float64 sum over the scored tokens, nats.")
    n_tokens: int = pa.Field(ge=1, description="Scored tokens.")

    class Config:
        """One row for each of a sequence's extras."""

        unique = EXTRA_KEY


class TokenExtra(Table):
    """The same token by token, nats."""

    model_id: str = pa.Field(str_matches=ID)
    numerics_id: str = pa.Field(str_matches=ID)
    sequence_id: str = pa.Field(str_matches=ID)
    extra: str = pa.Field(isin=EXTRAS)
    values: pl.List(pl.Float32)  # type: ignore[valid-type]

    class Config:
        """One row for each of a sequence's extras."""

        unique = EXTRA_KEY


class UnscoredSequence(Table):
    """One row is a sequence that could not be scored, though it was tried alone."""

    model_id: str = pa.Field(str_matches=ID)
    numerics_id: str = pa.Field(str_matches=ID)
    sequence_id: str = pa.Field(unique=True, str_matches=ID)
    rule: str = pa.Field(isin=["out_of_memory", "engine_died"])
    detail: str = pa.Field(description="What the engine said.")
