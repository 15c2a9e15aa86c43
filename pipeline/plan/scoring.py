"""What a plan may say of scoring and of its checks."""

from typing import Literal

from pydantic import BaseModel, Field

from pipeline.plan.faults import SECTION, Name

Extra = Literal["log_sum_squares", "entropy"]
"""What may be computed of a scored token's distribution p over the vocabulary, nats.

`log_sum_squares`: log sum_v p(v)^2 (WPO, arXiv 2406.11827). `entropy`: -sum_v p(v) log p(v).
"""


class _Section(BaseModel):
    model_config = SECTION


class ParityConfig(_Section):
    """A second engine that scores some pairs again, so that a check can compare the rewards."""

    engine: Literal["torch", "vllm"]
    split: Literal["train", "test", "evaluation"] = "test"
    policies: list[Name] | None = Field(
        default=None, description="Objectives and audits to compare; null: all."
    )
    max_pairs: int | None = Field(default=None, ge=1, description="The first by their ids' hash.")
    tolerance: float | None = Field(
        default=None, gt=0, description="Nats per sequence; null: 5e-3 in float32, 1.0 in half."
    )

    def allowed(self, dtype: str) -> float:
        """What the two engines' log-ratios of one sequence may differ by, nats."""
        return self.tolerance or (5e-3 if dtype == "float32" else 1.0)


class ScoringConfig(_Section):
    """How scoring is cut up and checked. Nothing here changes an id."""

    workers: int | None = Field(
        default=None,
        ge=1,
        description="Processes that score side by side; null: one per GPU (or parallel group), "
        "one on a CPU.",
    )
    commit_rows: int | None = Field(
        default=None, ge=1, description="Sequences per committed part; null: 64, on a GPU 2048."
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Tokens per forward pass, 0: one sequence or pair; null: 1024 for torch on a "
        "CPU, 8192 elsewhere. vLLM batches by itself, and knows only 0 and more than 0.",
    )
    null_test: Literal["when_scored", "always"] = "when_scored"
    null_test_rows: int = Field(default=8, ge=1)
    null_test_tolerance: float | None = Field(
        default=None, gt=0, description="Nats per sequence; by dtype where null."
    )
    token_extras: list[Extra] = Field(
        default=[],
        description="Computed of every scored token of a policy beside its log-prob, by the torch "
        "engine only: `log_sum_squares` lets `loss_landscape` answer for WPO.",
    )
    parity: ParityConfig | None = None
    accept_equivalent: float | None = Field(
        default=None,
        ge=0,
        description="After an upgrade of the engine, audits go on with the log-probs of the "
        "numerics before it if a sample scored anew (`null_test_rows`) differs by no more than so "
        "many nats per sequence; null: everything is scored anew.",
    )
    train_pairs: int | None = Field(
        default=None,
        ge=0,
        description="Training pairs that policies are scored and reported on, the first by their "
        "ids' hash; null: all. Held-out pairs are always scored. Of labels it is the same.",
    )

    def tolerance(self, dtype: str) -> float:
        """What two scores of one sequence may differ by, nats.

        Half precision leaves some 0.03 nats per token, so about 0.7 on a reply of 500 tokens.
        """
        if self.null_test_tolerance is not None:
            return self.null_test_tolerance
        return 1e-3 if dtype == "float32" else 1.0
