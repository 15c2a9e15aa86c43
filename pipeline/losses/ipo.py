"""Squared losses: IPO (Azar et al. 2023, arXiv 2310.12036), the lecture's IPO, and SPPO.

The paper writes IPO of sequence log-probs; its authors told TRL that their results used the mean
per token, which TRL has computed since 2024-01. The lecture's form (section 8.2) aims elsewhere.
All three are here; their targets differ in size and unit.
"""

from typing import TYPE_CHECKING

from pipeline.losses.base import LossSpec, Pair, PairBatch, Statistics, Target, Values
from pipeline.losses.dpo import BETA, opposite, reward_margin
from pipeline.losses.scales import LOG_RATIO, MEAN_LOG_RATIO, REWARD

if TYPE_CHECKING:
    import torch


def _target(values: Values) -> float:
    return 1 / (2 * values["beta"])


def _off(batch: PairBatch, values: Values) -> "torch.Tensor":
    return batch.chosen.log_ratio - batch.rejected.log_ratio - _target(values)


def ipo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """(h - 1 / (2 beta))^2 per pair, [B], nats^2 (eq. 17; beta is the paper's tau).

    h is the chosen log-ratio minus the rejected one, sums over the replies.
    """
    return _off(batch, values) ** 2


def ipo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """2 (h - 1 / (2 beta)), nats."""
    return opposite(2 * _off(batch, values))


def _off_mean(batch: PairBatch, values: Values) -> "torch.Tensor":
    return batch.chosen.mean_log_ratio - batch.rejected.mean_log_ratio - _target(values)


def ipo_mean_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """The same of log-ratios divided by their scored tokens, [B], (nats per token)^2."""
    return _off_mean(batch, values) ** 2


def ipo_mean_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """2 (h - 1 / (2 beta)), nats per token."""
    return opposite(2 * _off_mean(batch, values))


def lecture_ipo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """(reward margin - 1 / beta)^2 per pair, [B].

    It aims at 1 / beta^2 nats where the paper's aims at 1 / (2 tau): it is beta^2 times `ipo` with
    tau = beta^2 / 2.
    """
    return (reward_margin(batch, values) - 1 / values["beta"]) ** 2


def lecture_ipo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """2 (m - 1 / beta)."""
    return opposite(2 * (reward_margin(batch, values) - 1 / values["beta"]))


def sppo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2 per pair, [B], nats^2.

    Algorithm 1 with eta = 1 / beta and the winner's probability 1 (`hard`).
    """
    target = _target(values)
    return (batch.chosen.log_ratio - target) ** 2 + (batch.rejected.log_ratio + target) ** 2


def sppo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """2 (h_w - 1 / (2 beta)) and 2 (h_l + 1 / (2 beta)), nats."""
    target = _target(values)
    return 2 * (batch.chosen.log_ratio - target), 2 * (batch.rejected.log_ratio + target)


IPO = LossSpec(
    name="ipo",
    paper="Azar et al. 2023, arXiv 2310.12036, eq. 17",
    formula="(m - 1/(2β))²",
    gradient="2 (m - 1/(2β))",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=LOG_RATIO,
    loss=ipo_loss,
    slopes=ipo_slopes,
    target=lambda values: Target(_target(values), "nats"),
)
IPO_MEAN = LossSpec(
    name="ipo_mean",
    paper="Azar et al. 2023, arXiv 2310.12036, eq. 17, of means per token as in TRL",
    formula="(m - 1/(2β))²",
    gradient="2 (m - 1/(2β))",
    parameters={"beta": BETA},
    needs=("reference", "lengths"),
    scale=MEAN_LOG_RATIO,
    loss=ipo_mean_loss,
    slopes=ipo_mean_slopes,
    target=lambda values: Target(_target(values), "nats per token"),
)
LECTURE_IPO = LossSpec(
    name="lecture_ipo",
    paper="the lecture, section 8.2, after Azar et al. 2023, arXiv 2310.12036",
    formula="(m - 1/β)²",
    gradient="2 (m - 1/β)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=lecture_ipo_loss,
    slopes=lecture_ipo_slopes,
    target=lambda values: Target(1 / values["beta"] ** 2, "nats"),
)
SPPO_HARD = LossSpec(
    name="sppo_hard",
    paper="Wu et al. 2024 (SPPO), arXiv 2405.00675, algorithm 1, with hard probabilities",
    formula="(s_w - 1/(2β))² + (s_l + 1/(2β))²",
    gradient="chosen 2 (s_w - 1/(2β)), rejected 2 (s_l + 1/(2β))",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=LOG_RATIO,
    loss=sppo_loss,
    slopes=sppo_slopes,
    target=lambda values: Target(1 / values["beta"], "nats"),
)
