"""IPO and KTO as the lecture writes them (sections 8.2 and 8.4), which is not as their papers do.

Both are of implicit rewards, beta x log-ratio.
"""

from typing import TYPE_CHECKING

import polars as pl

from pipeline.losses.base import LossSpec, PairBatch, Statistics, Target, Values
from pipeline.losses.dpo import reward
from pipeline.losses.sigmoid import sigmoid, sigmoid_slope

if TYPE_CHECKING:
    import torch


def lecture_ipo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """(reward margin - 1 / beta)^2 per pair, [B].

    It aims at 1 / beta^2 nats where the paper's aims at 1 / (2 tau): it is beta^2 times `ipo` with
    tau = beta^2 / 2.
    """
    chosen = batch.policy_chosen - batch.reference_chosen
    rejected = batch.policy_rejected - batch.reference_rejected
    beta = values["beta"]
    return (beta * (chosen - rejected) - 1 / beta) ** 2


def lecture_kto_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """1 - sigmoid(chosen reward) + sigmoid(rejected reward) per pair, [B].

    Twice `kto` with z0 = 0 and both weights 1: the means of the two classes are added, not pooled.
    The same as APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7).
    """
    beta = values["beta"]
    chosen = batch.policy_chosen - batch.reference_chosen
    rejected = batch.policy_rejected - batch.reference_rejected
    return sigmoid(-beta * chosen) + sigmoid(beta * rejected)


def _ipo_gradient_weight(
    chosen: pl.Expr, rejected: pl.Expr, values: Values, statistics: Statistics
) -> pl.Expr:
    return 2 * (chosen - rejected - 1 / values["beta"]).abs()


def _kto_gradient_weight(
    chosen: pl.Expr, rejected: pl.Expr, values: Values, statistics: Statistics
) -> pl.Expr:
    """The mean of both sides' |dLoss/d reward|, each sigmoid(r) * sigmoid(-r)."""
    return (sigmoid_slope(chosen) + sigmoid_slope(rejected)) / 2


LECTURE_IPO = LossSpec(
    name="lecture_ipo",
    paper="the lecture, section 8.2, after Azar et al. 2023, arXiv 2310.12036",
    defaults={"beta": 0.1},
    needs_reference=True,
    needs_kl=False,
    loss=lecture_ipo_loss,
    score=reward,
    gradient_weight=_ipo_gradient_weight,
    target=lambda values: Target(1 / values["beta"] ** 2, "nats"),
)

LECTURE_KTO = LossSpec(
    name="lecture_kto",
    paper="the lecture, section 8.4, after Ethayarajh et al. 2024, arXiv 2402.01306",
    defaults={"beta": 0.1},
    needs_reference=True,
    needs_kl=False,
    loss=lecture_kto_loss,
    score=reward,
    gradient_weight=_kto_gradient_weight,
    target=lambda values: None,
)
