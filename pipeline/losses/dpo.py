"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290; lecture section 5.2)."""

from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.losses.base import LossSpec, PairBatch, Statistics, Values
from pipeline.rewards import dpo_gradient_weight

if TYPE_CHECKING:
    import torch


def dpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * h) per pair, [B], h being the chosen log-ratio minus the rejected one."""
    from torch.nn import functional as F

    chosen = batch.policy_chosen - batch.reference_chosen
    rejected = batch.policy_rejected - batch.reference_rejected
    return -F.logsigmoid(values["beta"] * (chosen - rejected))


def reward(logratio: Any, logprob: Any, n_tokens: Any, values: Values) -> Any:
    """The implicit reward: beta x log-ratio."""
    return values["beta"] * logratio


def _gradient_weight(
    chosen: pl.Expr, rejected: pl.Expr, values: Values, statistics: Statistics
) -> pl.Expr:
    return dpo_gradient_weight(chosen - rejected)


DPO = LossSpec(
    name="dpo",
    paper="Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
    defaults={"beta": 0.1},
    needs_reference=True,
    needs_kl=False,
    loss=dpo_loss,
    score=reward,
    gradient_weight=_gradient_weight,
    target=lambda values: None,
)
