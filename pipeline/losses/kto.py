"""Losses of either side on its own: KTO, the lecture's KTO and APO, NCA, BCO."""

from typing import TYPE_CHECKING

from pipeline.losses.base import LossSpec, Pair, PairBatch, Parameter, Statistics, Values
from pipeline.losses.dpo import BETA, logistic, reward_margin
from pipeline.losses.scales import REWARD
from pipeline.losses.stable import sigmoid, sigmoid_slope

if TYPE_CHECKING:
    import torch


def _rewards(batch: PairBatch, values: Values) -> Pair:
    return values["beta"] * batch.chosen.log_ratio, values["beta"] * batch.rejected.log_ratio


def kto_rows(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """The losses of a pair's desirable and undesirable row, [B] each.

    A desirable row of log-ratio h costs desirable_weight * (1 - sigmoid(beta * (h - z0))), an
    undesirable one undesirable_weight * (1 - sigmoid(beta * (z0 - h))). z0 is the mismatched
    replies' mean log-ratio, nats, not below 0.
    """
    beta, z0 = values["beta"], _reference_point(statistics)
    desirable = values["desirable_weight"] * sigmoid(beta * (z0 - batch.chosen.log_ratio))
    undesirable = values["undesirable_weight"] * sigmoid(beta * (batch.rejected.log_ratio - z0))
    return desirable, undesirable


def kto_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """The mean of a pair's rows, [B]: the mean over pairs is the paper's and TRL's over rows."""
    desirable, undesirable = kto_rows(batch, values, statistics)
    return (desirable + undesirable) / 2


def _reference_point(statistics: Statistics) -> float:
    return max(statistics["kl"], 0.0)  # in this order a NaN stays one, and shows in the loss


def kto_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-weight / 2 * sigmoid(u) * sigmoid(-u) and its opposite, u the reward minus beta * z0.

    The halves are the loss's: it is a mean of two rows.
    """
    chosen, rejected = _rewards(batch, values)
    shift = values["beta"] * _reference_point(statistics)
    return (
        -values["desirable_weight"] / 2 * sigmoid_slope(chosen - shift),
        values["undesirable_weight"] / 2 * sigmoid_slope(rejected - shift),
    )


def apo_zero_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """1 - sigmoid(chosen reward) + sigmoid(rejected reward) per pair, [B] (APO, eq. 7).

    It is the lecture's KTO: twice `kto` with z0 = 0 and both weights 1, the means of the two
    classes being added, not pooled.
    """
    beta = values["beta"]
    return sigmoid(-beta * batch.chosen.log_ratio) + sigmoid(beta * batch.rejected.log_ratio)


def apo_zero_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(r) sigmoid(-r) and its opposite."""
    chosen, rejected = _rewards(batch, values)
    return -sigmoid_slope(chosen), sigmoid_slope(rejected)


def apo_down_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """Sigmoid(chosen reward) + 1 - sigmoid(reward margin) per pair, [B] (APO, eq. 8)."""
    chosen, _ = _rewards(batch, values)
    return sigmoid(chosen) + sigmoid(-reward_margin(batch, values))


def apo_down_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """Sigmoid'(r_w) - sigmoid'(m), and sigmoid'(m)."""
    chosen, _ = _rewards(batch, values)
    apart = sigmoid_slope(reward_margin(batch, values))
    return sigmoid_slope(chosen) - apart, apart


def nca_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2 per pair, [B]."""
    chosen, rejected = _rewards(batch, values)
    return logistic(chosen) + (logistic(-chosen) + logistic(-rejected)) / 2


def nca_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """Sigmoid(r_w) / 2 - sigmoid(-r_w), and sigmoid(r_l) / 2."""
    chosen, rejected = _rewards(batch, values)
    return sigmoid(chosen) / 2 - sigmoid(-chosen), sigmoid(rejected) / 2


def bco_statistic(batch: PairBatch, values: Values, before: Statistics) -> Statistics:
    """`shift`: the mean of the two classes' mean rewards (delta of the paper's section 4)."""
    means = [rewards.mean() for rewards in _rewards(batch, values) if len(rewards)]
    return {"shift": (sum(means[1:], means[0]) / len(means)).item()}


def bco_pair_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(r_w - shift) - log sigmoid(-(r_l - shift)) per pair, [B]."""
    chosen, rejected = _rewards(batch, values)
    return logistic(chosen - statistics["shift"]) + logistic(statistics["shift"] - rejected)


def bco_pair_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-(r_w - shift)) and sigmoid(r_l - shift)."""
    chosen, rejected = _rewards(batch, values)
    shift = statistics["shift"]
    return -sigmoid(shift - chosen), sigmoid(rejected - shift)


def bco_unpaired_rows(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """The losses of a pair's two rows, [B] each; the undesirable one times `undesirable_weight`.

    The paper's weight is a density ratio of prompts per row; of pairs, which share their prompts,
    it is 1.
    """
    chosen, rejected = _rewards(batch, values)
    desirable = logistic(chosen - statistics["shift"])
    undesirable = values["undesirable_weight"] * logistic(statistics["shift"] - rejected)
    return desirable, undesirable


def bco_unpaired_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """The mean of a pair's two rows, [B]."""
    desirable, undesirable = bco_unpaired_rows(batch, values, statistics)
    return (desirable + undesirable) / 2


def bco_unpaired_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """Half of `bco_pair`'s, the rejected one times its weight."""
    chosen, rejected = bco_pair_slopes(batch, values, statistics)
    return chosen / 2, rejected / 2 * values["undesirable_weight"]


def bco_unshifted_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """`bco_pair` without the shift, as TRL has it since 0.29, [B]."""
    return bco_pair_loss(batch, values, {"shift": 0.0})


def bco_unshifted_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-r_w) and sigmoid(r_l)."""
    return bco_pair_slopes(batch, values, {"shift": 0.0})


_WEIGHT = Parameter(1.0, above=0)
_BCO = "Jung et al. 2024, arXiv 2404.04656"

KTO = LossSpec(
    name="kto",
    paper="Ethayarajh et al. 2024, arXiv 2402.01306",
    formula="[λ_w (1 - σ(s_w - β z0)) + λ_l (1 - σ(β z0 - s_l))] / 2",
    gradient="chosen -λ_w/2 σ'(s_w - β z0), rejected λ_l/2 σ'(s_l - β z0)",
    parameters={"beta": BETA, "desirable_weight": _WEIGHT, "undesirable_weight": _WEIGHT},
    needs=("reference", "kl"),
    scale=REWARD,
    loss=kto_loss,
    slopes=kto_slopes,
    rows=kto_rows,
)
APO_ZERO = LossSpec(
    name="apo_zero",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7",
    formula="1 - σ(s_w) + σ(s_l)",
    gradient="chosen -σ'(s_w), rejected σ'(s_l)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=apo_zero_loss,
    slopes=apo_zero_slopes,
)
LECTURE_KTO = LossSpec(
    name="lecture_kto",
    paper="the lecture, section 8.4, after Ethayarajh et al. 2024, arXiv 2402.01306",
    formula="1 - σ(s_w) + σ(s_l)",
    gradient="chosen -σ'(s_w), rejected σ'(s_l)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=apo_zero_loss,
    slopes=apo_zero_slopes,
)
APO_DOWN = LossSpec(
    name="apo_down",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8",
    formula="σ(s_w) + 1 - σ(m)",
    gradient="chosen σ'(s_w) - σ'(m), rejected σ'(m)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=apo_down_loss,
    slopes=apo_down_slopes,
)
NCA_PAIR = LossSpec(
    name="nca_pair",
    paper="Chen et al. 2024, arXiv 2402.05369",
    formula="-log σ(s_w) - log σ(-s_w) / 2 - log σ(-s_l) / 2",
    gradient="chosen σ(s_w)/2 - σ(-s_w), rejected σ(s_l)/2",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=nca_loss,
    slopes=nca_slopes,
)
BCO_PAIR = LossSpec(
    name="bco_pair",
    paper=_BCO,
    formula="-log σ(s_w - δ) - log σ(δ - s_l), δ the mean score of all replies",
    gradient="chosen -σ(δ - s_w), rejected σ(s_l - δ)",
    parameters={"beta": BETA},
    needs=("reference", "batch"),
    scale=REWARD,
    loss=bco_pair_loss,
    slopes=bco_pair_slopes,
    statistic=bco_statistic,
)
BCO_UNPAIRED = LossSpec(
    name="bco_unpaired",
    paper=_BCO,
    formula="[-log σ(s_w - δ) - w log σ(δ - s_l)] / 2, δ the mean score of all replies",
    gradient="chosen -σ(δ - s_w)/2, rejected w σ(s_l - δ)/2",
    parameters={"beta": BETA, "undesirable_weight": _WEIGHT},
    needs=("reference", "batch"),
    scale=REWARD,
    loss=bco_unpaired_loss,
    slopes=bco_unpaired_slopes,
    statistic=bco_statistic,
    rows=bco_unpaired_rows,
)
BCO_PAIR_UNSHIFTED = LossSpec(
    name="bco_pair_unshifted",
    paper=f"{_BCO}, without δ, as TRL has it since 0.29",
    formula="-log σ(s_w) - log σ(-s_l)",
    gradient="chosen -σ(-s_w), rejected σ(s_l)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=bco_unshifted_loss,
    slopes=bco_unshifted_slopes,
)
