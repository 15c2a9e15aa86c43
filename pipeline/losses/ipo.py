"""Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036).

The paper writes the loss of sequence log-probs; its authors told TRL that their results used the
mean per token, which TRL has computed since 2024-01. Both are here; their targets differ in unit.
"""

from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.losses.base import LossSpec, PairBatch, Statistics, Target, Values

if TYPE_CHECKING:
    import torch


def ipo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """(h - 1 / (2 beta))^2 per pair, [B], nats^2 (eq. 17; beta is the paper's tau).

    h is the chosen log-ratio minus the rejected one, sums over the replies.
    """
    chosen = batch.policy_chosen - batch.reference_chosen
    rejected = batch.policy_rejected - batch.reference_rejected
    return (chosen - rejected - _target(values)) ** 2


def ipo_mean_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """The same of log-ratios divided by their scored tokens, [B], (nats per token)^2."""
    chosen = (batch.policy_chosen - batch.reference_chosen) / batch.n_chosen
    rejected = (batch.policy_rejected - batch.reference_rejected) / batch.n_rejected
    return (chosen - rejected - _target(values)) ** 2


def _target(values: Values) -> float:
    return 1 / (2 * values["beta"])


def _log_ratio(logratio: Any, logprob: Any, n_tokens: Any, values: Values) -> Any:
    return logratio


def _mean_log_ratio(logratio: Any, logprob: Any, n_tokens: Any, values: Values) -> Any:
    return logratio / n_tokens


def _gradient_weight(
    chosen: pl.Expr, rejected: pl.Expr, values: Values, statistics: Statistics
) -> pl.Expr:
    return 2 * (chosen - rejected - _target(values)).abs()


IPO = LossSpec(
    name="ipo",
    paper="Azar et al. 2023, arXiv 2310.12036, eq. 17",
    defaults={"beta": 0.1},
    needs_reference=True,
    needs_kl=False,
    loss=ipo_loss,
    score=_log_ratio,
    gradient_weight=_gradient_weight,
    target=lambda values: Target(_target(values), "nats"),
)

IPO_MEAN = LossSpec(
    name="ipo_mean",
    paper="Azar et al. 2023, arXiv 2310.12036, eq. 17, of means per token as in TRL",
    defaults={"beta": 0.1},
    needs_reference=True,
    needs_kl=False,
    loss=ipo_mean_loss,
    score=_mean_log_ratio,
    gradient_weight=_gradient_weight,
    target=lambda values: Target(_target(values), "nats per token"),
)
