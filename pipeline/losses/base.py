"""What a preference loss is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PairBatch:
    """Sequence log-probs of B pairs, nats, each a tensor [B]; the reference's carry no gradient."""

    policy_chosen: "torch.Tensor"
    policy_rejected: "torch.Tensor"
    reference_chosen: "torch.Tensor"
    reference_rejected: "torch.Tensor"


@dataclass(frozen=True)
class LossSpec:
    """A loss with what the rest of the house must know about it.

    Attributes:
        name: as a plan names it.
        paper: where the formula comes from.
        loss: (batch, beta) to per-pair losses [B].
        score: (log-ratio, policy log-prob, scored tokens, beta) of one reply to its score in the
            loss's own scale, as Polars expressions; the loss is a function of the two scores.
        gradient_weight: |dLoss/d(score margin)| as an expression of the score margin.
    """

    name: str
    paper: str
    loss: Callable[[PairBatch, float], "torch.Tensor"]
    score: Callable[[pl.Expr, pl.Expr, pl.Expr, float], pl.Expr]
    gradient_weight: Callable[[pl.Expr], pl.Expr]
