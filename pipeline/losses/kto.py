"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306) over pairs."""

from typing import TYPE_CHECKING

import polars as pl

from pipeline.losses.base import LossSpec, PairBatch, Statistics, Values
from pipeline.losses.dpo import reward
from pipeline.losses.sigmoid import sigmoid, sigmoid_slope

if TYPE_CHECKING:
    import torch


def kto_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """The mean of a pair's desirable and undesirable row, [B].

    A desirable row of log-ratio h costs desirable_weight * (1 - sigmoid(beta * (h - z0))), an
    undesirable one undesirable_weight * (1 - sigmoid(beta * (z0 - h))). z0 is the mismatched
    replies' mean log-ratio, nats, not below 0. The mean over pairs is the paper's and TRL's mean
    over rows.
    """
    beta, z0 = values["beta"], _reference_point(statistics)
    chosen = batch.policy_chosen - batch.reference_chosen
    rejected = batch.policy_rejected - batch.reference_rejected
    desirable = values["desirable_weight"] * sigmoid(beta * (z0 - chosen))
    undesirable = values["undesirable_weight"] * sigmoid(beta * (rejected - z0))
    return (desirable + undesirable) / 2


def _reference_point(statistics: Statistics) -> float:
    return max(statistics["kl"], 0.0)  # in this order a NaN stays one, and shows in the loss


def _gradient_weight(
    chosen: pl.Expr, rejected: pl.Expr, values: Values, statistics: Statistics
) -> pl.Expr:
    """The mean of both sides' |dLoss/d reward|, each weight / 2 * sigmoid(u) * sigmoid(-u).

    u is the side's reward minus beta * z0. The halves are the loss's: it is a mean of two rows.
    """
    shift = values["beta"] * _reference_point(statistics)
    desirable = values["desirable_weight"] / 2 * sigmoid_slope(chosen - shift)
    undesirable = values["undesirable_weight"] / 2 * sigmoid_slope(rejected - shift)
    return (desirable + undesirable) / 2


KTO = LossSpec(
    name="kto",
    paper="Ethayarajh et al. 2024, arXiv 2402.01306",
    defaults={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    needs_reference=True,
    needs_kl=True,
    loss=kto_loss,
    score=reward,
    gradient_weight=_gradient_weight,
    target=lambda values: None,
)
