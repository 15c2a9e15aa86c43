"""Simple preference optimisation, without a reference (Meng et al. 2024, arXiv 2405.14734)."""

from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.losses.base import LossSpec, PairBatch, Statistics, Target, Values
from pipeline.rewards import dpo_gradient_weight

if TYPE_CHECKING:
    import torch


def simpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * (mean log-prob chosen - rejected) - gamma) per pair, [B] (eq. 6).

    The means are over scored tokens, nats per token. Gamma is absolute, as in the paper; some
    implementations ask for gamma / beta instead.
    """
    from torch.nn import functional as F

    chosen = batch.policy_chosen / batch.n_chosen
    rejected = batch.policy_rejected / batch.n_rejected
    return -F.logsigmoid(values["beta"] * (chosen - rejected) - values["gamma"])


def _score(logratio: Any, logprob: Any, n_tokens: Any, values: Values) -> Any:
    return values["beta"] * logprob / n_tokens


def _gradient_weight(
    chosen: pl.Expr, rejected: pl.Expr, values: Values, statistics: Statistics
) -> pl.Expr:
    return dpo_gradient_weight(chosen - rejected - values["gamma"])


SIMPO = LossSpec(
    name="simpo",
    paper="Meng et al. 2024, arXiv 2405.14734, eq. 6",
    defaults={"beta": 2.0, "gamma": 1.0},  # gamma / beta = 0.5, inside the paper's grid of 0 to 1
    needs_reference=False,
    needs_kl=False,
    loss=simpo_loss,
    score=_score,
    gradient_weight=_gradient_weight,
    # The margin it asks for, where the loss is ln 2; beyond it the loss goes on falling.
    target=lambda values: Target(values["gamma"] / values["beta"], "nats per token"),
)
