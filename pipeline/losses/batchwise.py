"""Losses of a pair among others: AOT sorts the batch, β-DPO sets β by its mean margin."""

from typing import TYPE_CHECKING

from pipeline.losses.base import LossSpec, Pair, PairBatch, Parameter, Statistics, Values
from pipeline.losses.dpo import BETA, logistic, opposite, smoothed, smoothed_slope
from pipeline.losses.scales import REWARD
from pipeline.losses.stable import sigmoid

if TYPE_CHECKING:
    import torch

_KEPT = 0.9
_SMALLEST_BETA = 1e-3


def _paired(batch: PairBatch, values: Values) -> "torch.Tensor":
    policy = batch.policy_chosen - batch.policy_rejected
    reference = batch.reference_chosen - batch.reference_rejected
    return values["beta"] * (policy - reference[batch.reference_partners])


def aot_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO's loss of policy margins against reference margins of equal rank, [B].

    The margins are log-prob differences, nats; a pair's loss stands where its policy margin is.
    """
    return smoothed(_paired(batch, values), values["label_smoothing"])


def aot_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """E sigmoid(m) - (1 - e) sigmoid(-m), of the matched margin m."""
    return opposite(smoothed_slope(_paired(batch, values), values["label_smoothing"]))


def aot_unpaired_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO's loss of chosen log-ratios against rejected ones of equal rank, [B].

    A pair's loss stands where its chosen reply is.
    """
    chosen, rejected = batch.chosen.log_ratio, batch.rejected.log_ratio
    margin = values["beta"] * (chosen - rejected[batch.rejected_partners])
    return smoothed(margin, values["label_smoothing"])


def aot_unpaired_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """Each side's, of the margin it has with the reply of equal rank."""
    import torch

    chosen, rejected = batch.chosen.log_ratio, batch.rejected.log_ratio
    partners = batch.rejected_partners
    margin = values["beta"] * (chosen - rejected[partners])
    of_chosen = smoothed_slope(margin, values["label_smoothing"])
    of_rejected = torch.empty_like(of_chosen)
    of_rejected[partners] = -of_chosen
    return of_chosen, of_rejected


def beta_statistic(batch: PairBatch, values: Values, before: Statistics) -> Statistics:
    """`surplus`: how far the batch's mean margin h is above its running mean, nats.

    `running` is that mean (0.9 of the one before, 0.1 of this batch's), the first batch's at first.
    """
    mean = (batch.chosen.log_ratio - batch.rejected.log_ratio).mean().item()
    running = before.get("running", mean)
    return {"surplus": mean - running, "running": _KEPT * running + (1 - _KEPT) * mean}


def _dynamic_margin(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    beta = values["beta"] * (1 + values["alpha"] * statistics["surplus"])
    h = batch.chosen.log_ratio - batch.rejected.log_ratio
    return max(beta, _SMALLEST_BETA) * h


def beta_dpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO with beta (1 + alpha * surplus), at least 0.001, per batch, [B].

    The paper's other half, leaving out pairs far from the running mean, is a choice of data and
    not done here.
    """
    return logistic(_dynamic_margin(batch, values, statistics))


def beta_dpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-m) of the batch's beta, per reward of the plan's."""
    beta = values["beta"] * (1 + values["alpha"] * statistics["surplus"])
    weight = sigmoid(-_dynamic_margin(batch, values, statistics))
    return opposite(-weight * (max(beta, _SMALLEST_BETA) / values["beta"]))


_SMOOTHING = Parameter(0.0, least=0, below=0.5)
_AOT = "Melnyk et al. 2024, arXiv 2406.05882"

AOT = LossSpec(
    name="aot",
    paper=f"{_AOT}, paired",
    formula="-(1-e) log σ(m) - e log σ(-m), m = β (policy margin - reference margin of equal rank)",
    gradient="e σ(m) - (1-e) σ(-m)",
    parameters={"beta": BETA, "label_smoothing": _SMOOTHING},
    needs=("reference", "batch"),
    scale=REWARD,
    loss=aot_loss,
    slopes=aot_slopes,
)
AOT_UNPAIRED = LossSpec(
    name="aot_unpaired",
    paper=f"{_AOT}, unpaired",
    formula="-(1-e) log σ(m) - e log σ(-m), m = s_w - s_l of equal rank",
    gradient="e σ(m) - (1-e) σ(-m), each side of its own m",
    parameters={"beta": BETA, "label_smoothing": _SMOOTHING},
    needs=("reference", "batch"),
    scale=REWARD,
    loss=aot_unpaired_loss,
    slopes=aot_unpaired_slopes,
)
BETA_DPO = LossSpec(
    name="beta_dpo",
    paper="Wu et al. 2024, arXiv 2407.08639, batch-level β, without the filter of pairs",
    formula="-log σ(β' h), β' = max(0.001, β (1 + α (mean h - running mean)))",
    gradient="-σ(-β' h) β'/β",
    parameters={"beta": BETA, "alpha": Parameter(0.6, least=0)},
    needs=("reference", "batch"),
    scale=REWARD,
    loss=beta_dpo_loss,
    slopes=beta_dpo_slopes,
    statistic=beta_statistic,
)
