"""What a preference loss is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    import torch

Values = Mapping[str, float]
"""A loss's parameters by name, for instance beta and gamma."""

Statistics = Mapping[str, float]
"""What a loss knows of more than its own pair, by name: `kl`, the mean log-ratio of mismatched
replies in nats, for losses that say `needs_kl`. Constants to the gradient."""


@dataclass(frozen=True)
class PairBatch:
    """Sequence log-probs of B pairs, nats, each a tensor [B]; the reference's carry no gradient.

    A loss that does not need a reference may be given zeros for it. `n_*` are scored tokens, the
    end-of-turn included, as floats.
    """

    policy_chosen: "torch.Tensor"
    policy_rejected: "torch.Tensor"
    reference_chosen: "torch.Tensor"
    reference_rejected: "torch.Tensor"
    n_chosen: "torch.Tensor"
    n_rejected: "torch.Tensor"


@dataclass(frozen=True)
class Target:
    """The score margin where a loss is at rest (or, for SimPO, that it asks for), as text too.

    Attributes:
        nats: the margin of log-ratios (of log-probs, for a loss without reference).
        unit: `nats`, or `nats per token` where a reply counts by its mean.
    """

    nats: float
    unit: str

    def __str__(self) -> str:
        """For instance `5 nats`."""
        return f"{self.nats:.6g} {self.unit}"


@dataclass(frozen=True)
class LossSpec:
    """A loss with what the rest of the house must know about it.

    Attributes:
        name: as a plan names it.
        paper: where the formula comes from.
        defaults: its parameters and the values they have where a plan says nothing.
        needs_reference: false for a loss of the policy's log-probs alone.
        needs_kl: whether `statistics` must hold `kl`.
        loss: (batch, values, statistics) to per-pair losses [B]. A step's loss is their mean.
        score: (log-ratio, policy log-prob, scored tokens, values) of one reply to its score in the
            loss's own scale. Plain arithmetic: Polars expressions, tensors and numbers go through.
        gradient_weight: (score of chosen, score of rejected, values, statistics) to
            |dLoss/d score|, the mean of the two sides, as a Polars expression. For a loss of the
            score margin both sides are equal, and it is |dLoss/d margin|.
        target: values to the margin the loss aims at, or None if it always asks for more.
    """

    name: str
    paper: str
    defaults: Values
    needs_reference: bool
    needs_kl: bool
    loss: Callable[[PairBatch, Values, Statistics], "torch.Tensor"]
    score: Callable[[Any, Any, Any, Values], Any]
    gradient_weight: Callable[[pl.Expr, pl.Expr, Values, Statistics], pl.Expr]
    target: Callable[[Values], Target | None]
