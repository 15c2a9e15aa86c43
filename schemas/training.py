"""The training log."""

import pandera.polars as pa
import polars as pl
from pandera.typing.polars import Series

from schemas.base import ID, Table


class TrainingStep(Table):
    """One row is an optimiser step; names are TRL's. Rewards are beta times nats, logps nats.

    Each number is of the step's batch *before* its update. A reward is beta times the log-ratio;
    for a loss without reference it is its own score. A tie counts half in `rewards/accuracies`
    (in TRL it counts as wrong). Margins and accuracies are of pairs; `chosen` and `rejected` are of
    desirable and undesirable labels too. A number is null where the batch has nothing it is of.
    """

    policy_id: str = pa.Field(str_matches=ID)
    step: int = pa.Field(ge=1)
    epoch: float = pa.Field(ge=0)
    loss: float
    rewards_chosen: Series[pl.Float64] = pa.Field(alias="rewards/chosen", nullable=True)
    rewards_rejected: Series[pl.Float64] = pa.Field(alias="rewards/rejected", nullable=True)
    rewards_margins: Series[pl.Float64] = pa.Field(alias="rewards/margins", nullable=True)
    rewards_accuracies: Series[pl.Float64] = pa.Field(
        alias="rewards/accuracies", ge=0, le=1, nullable=True
    )
    logps_chosen: Series[pl.Float64] = pa.Field(alias="logps/chosen", nullable=True)
    logps_rejected: Series[pl.Float64] = pa.Field(alias="logps/rejected", nullable=True)
    entropy: float | None = pa.Field(
        nullable=True,
        ge=0,
        description="Mean over scored tokens, nats; null unless `training.token_statistics`.",
    )
    mean_token_accuracy: float | None = pa.Field(
        nullable=True,
        ge=0,
        le=1,
        description="Share of preferred replies' tokens that the policy would have chosen.",
    )
    kl: float | None = pa.Field(
        nullable=True,
        ge=0,
        description="Mean log-ratio of the step's mismatched replies, nats, at least 0; null for "
        "a loss that needs none.",
    )
    grad_norm: float = pa.Field(ge=0)
    learning_rate: float = pa.Field(ge=0)
    num_tokens: int = pa.Field(ge=1, description="Tokens seen since the start, prompts included.")


class TrainedExample(Table):
    """One row is an example a policy was given to train on; it stands beside the policy."""

    policy_id: str = pa.Field(str_matches=ID)
    example_id: str = pa.Field(unique=True, str_matches=ID, description="The pair's or label's.")
    weight: float = pa.Field(gt=0, description="How much it counted beside others of its step.")


class TrainingEvaluation(Table):
    """One row is an evaluation on held-out examples, after so many optimiser steps.

    Names and units are `TrainingStep`'s.
    """

    policy_id: str = pa.Field(str_matches=ID)
    step: int = pa.Field(ge=0, description="Optimiser steps taken before it.")
    n: int = pa.Field(ge=1, description="Examples.")
    eval_loss: float
    eval_rewards_chosen: Series[pl.Float64] = pa.Field(alias="eval_rewards/chosen", nullable=True)
    eval_rewards_rejected: Series[pl.Float64] = pa.Field(
        alias="eval_rewards/rejected", nullable=True
    )
    eval_rewards_margins: Series[pl.Float64] = pa.Field(alias="eval_rewards/margins", nullable=True)
    eval_rewards_accuracies: Series[pl.Float64] = pa.Field(
        alias="eval_rewards/accuracies", ge=0, le=1, nullable=True
    )
    eval_logps_chosen: Series[pl.Float64] = pa.Field(alias="eval_logps/chosen", nullable=True)
    eval_logps_rejected: Series[pl.Float64] = pa.Field(alias="eval_logps/rejected", nullable=True)
    eval_entropy: float | None = pa.Field(nullable=True, ge=0)
    eval_mean_token_accuracy: float | None = pa.Field(nullable=True, ge=0, le=1)
