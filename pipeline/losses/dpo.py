"""Direct preference optimisation and its logistic kin: -log sigmoid of a margin m."""

import math
from typing import TYPE_CHECKING

from pipeline.losses.base import (
    LossInputError,
    LossSpec,
    Pair,
    PairBatch,
    Parameter,
    Statistics,
    Target,
    Values,
)
from pipeline.losses.scales import MEAN_REWARD, REWARD
from pipeline.losses.stable import sigmoid

if TYPE_CHECKING:
    import torch

BETA = Parameter(0.1, above=0)
SMOOTHING = Parameter(0.1, least=0, below=0.5)
"""The share of pairs whose label is taken to be wrong."""


def reward_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    """Beta x h, [B], h being the chosen log-ratio minus the rejected one, nats."""
    return values["beta"] * (batch.chosen.log_ratio - batch.rejected.log_ratio)


def opposite(slope: "torch.Tensor") -> Pair:
    """The two sides' slopes of a loss of their margin."""
    return slope, -slope


def logistic(margin: "torch.Tensor") -> "torch.Tensor":
    """-log sigmoid(m), whose slope is -sigmoid(-m)."""
    from torch.nn import functional as F

    return -F.logsigmoid(margin)


def smoothed(margin: "torch.Tensor", smoothing: float) -> "torch.Tensor":
    """The logistic loss where a share of the labels counts the other way round."""
    return (1 - smoothing) * logistic(margin) + smoothing * logistic(-margin)


def smoothed_slope(margin: "torch.Tensor", smoothing: float) -> "torch.Tensor":
    """D `smoothed` / dm."""
    return smoothing * sigmoid(margin) - (1 - smoothing) * sigmoid(-margin)


def dpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * h) per pair, [B], h being the chosen log-ratio minus the rejected one."""
    return logistic(reward_margin(batch, values))


def dpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(r_rejected - r_chosen), of implicit rewards r (lecture section 6.2)."""
    return opposite(-sigmoid(-reward_margin(batch, values)))


def cdpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO where a share e of the labels is taken to be turned round, [B]."""
    return smoothed(reward_margin(batch, values), values["label_smoothing"])


def cdpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """(e sigmoid(m) - (1 - e) sigmoid(-m))."""
    return opposite(smoothed_slope(reward_margin(batch, values), values["label_smoothing"]))


def cdpo_target(values: Values) -> Target | None:
    """Log((1 - e) / e) / beta: the margin whose sigmoid is 1 - e."""
    e = values["label_smoothing"]
    return Target((math.log1p(-e) - math.log(e)) / values["beta"], "nats") if e > 0 else None


def robust_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO's loss, unbiased where a share e of the labels is turned round, [B] (eq. 10)."""
    m, e = reward_margin(batch, values), values["label_smoothing"]
    return ((1 - e) * logistic(m) - e * logistic(-m)) / (1 - 2 * e)


def robust_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-((1 - e) sigmoid(-m) + e sigmoid(m)) / (1 - 2e)."""
    m, e = reward_margin(batch, values), values["label_smoothing"]
    return opposite(-((1 - e) * sigmoid(-m) + e * sigmoid(m)) / (1 - 2 * e))


def _mean_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    return values["beta"] * (batch.chosen.mean_log_ratio - batch.rejected.mean_log_ratio)


def dpo_norm_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO of log-ratios divided by their scored tokens, [B]."""
    return logistic(_mean_margin(batch, values))


def dpo_norm_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-m)."""
    return opposite(-sigmoid(-_mean_margin(batch, values)))


def _length_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    return reward_margin(batch, values) + values["alpha"] * (batch.n_chosen - batch.n_rejected)


def rdpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO with a reward of -alpha per token taken out, [B] (eq. 9).

    The margin is r_w - r_l + alpha (n_w - n_l): a longer chosen reply has less to explain.
    """
    return logistic(_length_margin(batch, values))


def rdpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-(m + alpha (n_w - n_l)))."""
    return opposite(-sigmoid(-_length_margin(batch, values)))


def _positive_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    import torch

    lost = torch.relu(-batch.chosen.log_ratio)
    return reward_margin(batch, values) - values["beta"] * values["penalty"] * lost


def dpop_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * (h - penalty * max(0, -chosen log-ratio))) per pair, [B] (eq. 3)."""
    return logistic(_positive_margin(batch, values))


def dpop_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-u) of the penalised margin u, (1 + penalty) times that where chosen is lost."""
    weight = sigmoid(-_positive_margin(batch, values))
    lost = (batch.chosen.log_ratio < 0).to(weight.dtype)
    return -weight * (1 + values["penalty"] * lost), weight


def _offset_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    strength = batch.column("strength")
    if not bool((strength > 0).all()):
        raise LossInputError("odpo takes the log of strengths: each must be above 0")
    return reward_margin(batch, values) - values["alpha"] * strength.log()


def odpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * h - alpha * log(strength)) per pair, [B].

    The strength is the paper's difference of scores, and the logarithm its own choice of f.
    """
    return logistic(_offset_margin(batch, values))


def odpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-(m - alpha log strength))."""
    return opposite(-sigmoid(-_offset_margin(batch, values)))


DPO = LossSpec(
    name="dpo",
    paper="Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
    formula="-log σ(m)",
    gradient="-σ(-m)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=dpo_loss,
    slopes=dpo_slopes,
)
CDPO = LossSpec(
    name="cdpo",
    paper="Mitchell 2023, a note on DPO with noisy preferences",
    formula="-(1-e) log σ(m) - e log σ(-m), e = label_smoothing",
    gradient="e σ(m) - (1-e) σ(-m)",
    parameters={"beta": BETA, "label_smoothing": SMOOTHING},
    needs=("reference",),
    scale=REWARD,
    loss=cdpo_loss,
    slopes=cdpo_slopes,
    target=cdpo_target,
)
ROBUST = LossSpec(
    name="robust",
    paper="Chowdhury et al. 2024, arXiv 2403.00409",
    formula="[-(1-e) log σ(m) + e log σ(-m)] / (1-2e), e = label_smoothing",
    gradient="-[(1-e) σ(-m) + e σ(m)] / (1-2e)",
    parameters={"beta": BETA, "label_smoothing": SMOOTHING},
    needs=("reference",),
    scale=REWARD,
    loss=robust_loss,
    slopes=robust_slopes,
)
DPO_NORM = LossSpec(
    name="dpo_norm",
    paper="Lambert et al. 2024 (Tülu 3), arXiv 2411.15124, eq. 6",
    formula="-log σ(m)",
    gradient="-σ(-m)",
    parameters={"beta": Parameter(5.0, above=0)},
    needs=("reference", "lengths"),
    scale=MEAN_REWARD,
    loss=dpo_norm_loss,
    slopes=dpo_norm_slopes,
)
RDPO = LossSpec(
    name="rdpo",
    paper="Park et al. 2024, arXiv 2403.19159",
    formula="-log σ(m + α (n_w - n_l))",
    gradient="-σ(-(m + α (n_w - n_l)))",
    parameters={"beta": BETA, "alpha": Parameter(0.01, least=0)},
    needs=("reference", "lengths"),
    scale=REWARD,
    loss=rdpo_loss,
    slopes=rdpo_slopes,
)
DPOP = LossSpec(
    name="dpop",
    paper="Pal et al. 2024 (Smaug), arXiv 2402.13228",
    formula="-log σ(m - penalty max(0, -s_w))",
    gradient="chosen -σ(-u) (1 + penalty [s_w < 0]), rejected σ(-u); u the penalised margin",
    parameters={"beta": BETA, "penalty": Parameter(50.0, least=0)},
    needs=("reference",),
    scale=REWARD,
    loss=dpop_loss,
    slopes=dpop_slopes,
)
ODPO = LossSpec(
    name="odpo",
    paper="Amini et al. 2024, arXiv 2402.10571",
    formula="-log σ(m - α log strength)",
    gradient="-σ(-(m - α log strength))",
    parameters={"beta": BETA, "alpha": Parameter(1.0, least=0)},
    needs=("reference", "strength"),
    scale=REWARD,
    loss=odpo_loss,
    slopes=odpo_slopes,
    domain="strength > 0",
)
