"""Variants of DPO that need more than sums: LD-DPO, WPO, TDPO."""

from typing import TYPE_CHECKING

from pipeline.losses.base import (
    LossSpec,
    Pair,
    PairBatch,
    Parameter,
    Scale,
    Side,
    Statistics,
    Values,
)
from pipeline.losses.dpo import BETA, logistic, opposite, reward_margin
from pipeline.losses.scales import REWARD
from pipeline.losses.stable import sigmoid

if TYPE_CHECKING:
    import torch


def _discounted(side: Side, values: Values) -> "torch.Tensor":
    """The log-ratio where tokens beyond the shorter reply's length count alpha, nats."""
    prefix = side.column("policy_prefix") - side.column("reference_prefix")
    return prefix + values["alpha"] * (side.log_ratio - prefix)


def _discounted_policy(side: Side, values: Values) -> "torch.Tensor":
    """The same of the policy's log-prob alone, the reference's counting in full, nats."""
    tail = side.logprob - side.column("policy_prefix")
    return side.log_ratio - (1 - values["alpha"]) * tail


def _ld_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    chosen, rejected = (_discounted(side, values) for side in (batch.chosen, batch.rejected))
    return values["beta"] * (chosen - rejected)


def ld_dpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO where tokens beyond the shorter reply's length count alpha, in both models, [B]."""
    return logistic(_ld_margin(batch, values))


def ld_dpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-m)."""
    return opposite(-sigmoid(-_ld_margin(batch, values)))


def _ld_policy_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    chosen, rejected = (_discounted_policy(side, values) for side in (batch.chosen, batch.rejected))
    return values["beta"] * (chosen - rejected)


def ld_dpo_policy_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """`ld_dpo` with the policy alone discounted, [B]: its margin is not 0 at the reference."""
    return logistic(_ld_policy_margin(batch, values))


def ld_dpo_policy_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-m)."""
    return opposite(-sigmoid(-_ld_policy_margin(batch, values)))


def _trust(batch: PairBatch) -> "torch.Tensor":
    chosen, rejected = (side.column("alignment") for side in (batch.chosen, batch.rejected))
    return (chosen + rejected).exp()


def wpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO's loss times how likely both replies are under the policy, a constant, [B] (eq. 2).

    A reply's weight is the exp of its `alignment`: the mean over tokens of log p(token) -
    log sum p(v)^2, so that a reply sampled from the policy weighs about 1.
    """
    return _trust(batch) * logistic(reward_margin(batch, values))


def wpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-weights sigmoid(-m)."""
    return opposite(-_trust(batch) * sigmoid(-reward_margin(batch, values)))


def _sequential_kl(batch: PairBatch) -> "torch.Tensor":
    chosen, rejected = (side.column("sequential_kl") for side in (batch.chosen, batch.rejected))
    return rejected - chosen


def _tdpo_margin(batch: PairBatch, values: Values, share: float) -> "torch.Tensor":
    apart = values["beta"] * share * _sequential_kl(batch)
    return reward_margin(batch, values) - apart


def tdpo1_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * (h - (D_l - D_w))) per pair, [B]; D is a reply's sequential KL, nats."""
    return logistic(_tdpo_margin(batch, values, 1.0))


def tdpo1_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-(m - beta (D_l - D_w))), the sequential KLs held."""
    return opposite(-sigmoid(-_tdpo_margin(batch, values, 1.0)))


def tdpo2_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * (h - alpha * (D_l - D_w))) per pair, [B].

    The paper stops the gradient through D_w, which a trainer must do before it fills the column.
    """
    return logistic(_tdpo_margin(batch, values, values["alpha"]))


def tdpo2_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-(m - beta alpha (D_l - D_w))), the sequential KLs held."""
    return opposite(-sigmoid(-_tdpo_margin(batch, values, values["alpha"])))


def _full(side: Side, value: float) -> "torch.Tensor":
    import torch

    return torch.full_like(side.logprob, value)


_ALPHA = Parameter(0.5, least=0, most=1)
_LD = "Liu et al. 2024, arXiv 2409.06411"
_TDPO = "Zeng et al. 2024, arXiv 2404.11999"

LD_DPO = LossSpec(
    name="ld_dpo",
    paper=_LD,
    formula="-log σ(m)",
    gradient="-σ(-m)",
    parameters={"beta": BETA, "alpha": _ALPHA},
    needs=("reference", "policy_prefix", "reference_prefix"),
    scale=Scale(
        "β × log-ratio, tokens beyond the shorter reply's counting α",
        lambda side, values: values["beta"] * _discounted(side, values),
        lambda side, values: _full(side, values["beta"] * values["alpha"]),
    ),
    loss=ld_dpo_loss,
    slopes=ld_dpo_slopes,
)
LD_DPO_POLICY = LossSpec(
    name="ld_dpo_policy",
    paper=f"{_LD}, the policy alone discounted, as in TRL before 0.29",
    formula="-log σ(m)",
    gradient="-σ(-m)",
    parameters={"beta": BETA, "alpha": _ALPHA},
    needs=("reference", "policy_prefix"),
    scale=Scale(
        "β × log-ratio, the policy's tokens beyond the shorter reply's counting α",
        lambda side, values: values["beta"] * _discounted_policy(side, values),
        lambda side, values: _full(side, values["beta"] * values["alpha"]),
    ),
    loss=ld_dpo_policy_loss,
    slopes=ld_dpo_policy_slopes,
)
WPO = LossSpec(
    name="wpo",
    paper="Zhou et al. 2024, arXiv 2406.11827, eq. 2",
    formula="-w_w w_l log σ(m), w = exp(alignment)",
    gradient="-w_w w_l σ(-m)",
    parameters={"beta": BETA},
    needs=("reference", "alignment"),
    scale=REWARD,
    loss=wpo_loss,
    slopes=wpo_slopes,
)
TDPO1 = LossSpec(
    name="tdpo1",
    paper=f"{_TDPO}, TDPO1",
    formula="-log σ(m - β (D_l - D_w))",
    gradient="-σ(-(m - β (D_l - D_w)))",
    parameters={"beta": BETA},
    needs=("reference", "sequential_kl"),
    scale=REWARD,
    loss=tdpo1_loss,
    slopes=tdpo1_slopes,
)
TDPO2 = LossSpec(
    name="tdpo2",
    paper=f"{_TDPO}, TDPO2",
    formula="-log σ(m - β α (D_l - D_w))",
    gradient="-σ(-(m - β α (D_l - D_w)))",
    parameters={"beta": BETA, "alpha": Parameter(0.5, least=0)},
    needs=("reference", "sequential_kl"),
    scale=REWARD,
    loss=tdpo2_loss,
    slopes=tdpo2_slopes,
)
