"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290; lecture section 5.2)."""

from typing import TYPE_CHECKING

import polars as pl

from pipeline.losses.base import LossSpec, PairBatch
from pipeline.rewards import dpo_gradient_weight

if TYPE_CHECKING:
    import torch


def dpo_loss(batch: PairBatch, beta: float) -> "torch.Tensor":
    """-log sigmoid(beta * h) per pair, [B], h being the chosen log-ratio minus the rejected one."""
    from torch.nn import functional as F

    chosen = batch.policy_chosen - batch.reference_chosen
    rejected = batch.policy_rejected - batch.reference_rejected
    return -F.logsigmoid(beta * (chosen - rejected))


def _score(logratio: pl.Expr, logprob: pl.Expr, n_tokens: pl.Expr, beta: float) -> pl.Expr:
    return beta * logratio


DPO = LossSpec(
    name="dpo",
    paper="Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
    loss=dpo_loss,
    score=_score,
    gradient_weight=dpo_gradient_weight,
)
