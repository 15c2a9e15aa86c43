"""Losses of a reward margin that are not logistic: hinge, EXO, DiscoPOP, reward-aware, f-DPO."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.losses.base import (
    LossSpec,
    Pair,
    PairBatch,
    Parameter,
    Scale,
    Side,
    Statistics,
    Target,
    Values,
)
from pipeline.losses.dpo import BETA, cdpo_target, logistic, opposite, reward_margin
from pipeline.losses.scales import REWARD
from pipeline.losses.stable import (
    bernoulli_kl,
    power,
    power_difference,
    power_slope,
    sigmoid,
    sigmoid_slope,
)

if TYPE_CHECKING:
    import torch


def hinge_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """max(0, 1 - beta * h) per pair, [B] (RSO, eq. 10; SLiC's with a reference)."""
    import torch

    return torch.relu(1 - reward_margin(batch, values))


def hinge_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-1 below a margin of 1, and 0 from there on."""
    m = reward_margin(batch, values)
    return opposite(-(m < 1).to(m.dtype))


def exo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """KL of the policy's preference from the labels', [B] (eq. 16).

    A coin of log-odds beta * h against one that falls right with probability 1 - e.
    """
    m = reward_margin(batch, values)
    return bernoulli_kl(m, m.new_tensor(_label_odds(values)))


def exo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """Sigmoid(m) sigmoid(-m) (m - log((1 - e) / e))."""
    m = reward_margin(batch, values)
    return opposite(sigmoid_slope(m) * (m - _label_odds(values)))


def _label_odds(values: Values) -> float:
    return math.log1p(-values["label_smoothing"]) - math.log(values["label_smoothing"])


def discopop_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """(1 - w) (-log sigmoid(m)) + w exp(-m), w = sigmoid(m / tau), per pair, [B] (eq. 5)."""
    from torch.nn import functional as F

    m, tau = reward_margin(batch, values), values["tau"]
    return sigmoid(-m / tau) * logistic(m) + (F.logsigmoid(m / tau) - m).exp()


def discopop_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """W (1 - w) / tau (exp(-m) + log sigmoid(m)) - (1 - w) sigmoid(-m) - w exp(-m)."""
    from torch.nn import functional as F

    m, tau = reward_margin(batch, values), values["tau"]
    w, rest = F.logsigmoid(m / tau), F.logsigmoid(-m / tau)
    turning = ((w + rest - m).exp() - (w + rest).exp() * logistic(m)) / tau
    return opposite(turning - rest.exp() * sigmoid(-m) - (w - m).exp())


def _wanted(batch: PairBatch, values: Values) -> "torch.Tensor":
    return values["eta"] * batch.column("strength")


def rpo_sq_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """(beta * h - eta * strength)^2 per pair, [B]."""
    return (reward_margin(batch, values) - _wanted(batch, values)) ** 2


def rpo_sq_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """2 (m - eta strength)."""
    return opposite(2 * (reward_margin(batch, values) - _wanted(batch, values)))


def rpo_bwd_kl_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """KL of the strength's preference, log-odds eta * strength, from the policy's, [B]."""
    return bernoulli_kl(_wanted(batch, values), reward_margin(batch, values))


def rpo_bwd_kl_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """Sigmoid(m) - sigmoid(g), g = eta strength."""
    m, wanted = reward_margin(batch, values), _wanted(batch, values)
    return opposite(sigmoid(m) * sigmoid(-wanted) - sigmoid(-m) * sigmoid(wanted))


def rpo_fwd_kl_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """KL of the policy's preference, log-odds beta * h, from the strength's, [B]."""
    return bernoulli_kl(reward_margin(batch, values), _wanted(batch, values))


def rpo_fwd_kl_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """Sigmoid(m) sigmoid(-m) (m - g), g = eta strength."""
    m, wanted = reward_margin(batch, values), _wanted(batch, values)
    return opposite(sigmoid_slope(m) * (m - wanted))


def js_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    """Beta (f'(u_w) - f'(u_l)) of the Jensen-Shannon divergence: f'(u) = log(2u / (1 + u))."""
    from torch.nn import functional as F

    chosen, rejected = (F.logsigmoid(s.log_ratio) for s in (batch.chosen, batch.rejected))
    return values["beta"] * (chosen - rejected)


def fdpo_js_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO under the Jensen-Shannon divergence, [B]."""
    return logistic(js_margin(batch, values))


def fdpo_js_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-m)."""
    return opposite(-sigmoid(-js_margin(batch, values)))


def _js_score(side: Side, values: Values) -> "torch.Tensor":
    from torch.nn import functional as F

    return values["beta"] * (math.log(2) + F.logsigmoid(side.log_ratio))


def alpha_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    """Beta (f'(u_w) - f'(u_l)) of the alpha-divergence: f'(u) = (1 - u^-alpha) / alpha.

    Alpha 1 is the forward KL, and alpha to 0 the reverse KL, DPO's own.
    """
    alpha = values.get("alpha", 1.0)
    difference = power_difference(batch.chosen.log_ratio, batch.rejected.log_ratio, -alpha)
    return values["beta"] * difference


def fdpo_alpha_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """DPO under the alpha-divergence (without alpha, the forward KL), [B]."""
    return logistic(alpha_margin(batch, values))


def fdpo_alpha_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-m)."""
    return opposite(-sigmoid(-alpha_margin(batch, values)))


def _alpha_score(side: Side, values: Values) -> "torch.Tensor":
    return values["beta"] * power(side.log_ratio, -values.get("alpha", 1.0))


def _alpha_slope(side: Side, values: Values) -> "torch.Tensor":
    return values["beta"] * power_slope(side.log_ratio, -values.get("alpha", 1.0))


_F_DPO = "Wang et al. 2023, arXiv 2309.16240, table 1"
_NO_OVERFLOW = "α × log-ratio ≥ -701 (beyond, the score is held there)"

HINGE = LossSpec(
    name="hinge",
    paper="Liu et al. 2023 (RSO), arXiv 2309.06657, eq. 10, hinge-norm",
    formula="max(0, 1 - m)",
    gradient="-[m < 1]",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=REWARD,
    loss=hinge_loss,
    slopes=hinge_slopes,
    target=lambda values: Target(1 / values["beta"], "nats"),
)
EXO_PAIR = LossSpec(
    name="exo_pair",
    paper="Ji et al. 2024, arXiv 2402.00856, eq. 16",
    formula="σ(m) [log σ(m) - log(1-e)] + σ(-m) [log σ(-m) - log e], e = label_smoothing",
    gradient="σ(m) σ(-m) (m - log((1-e)/e))",
    parameters={"beta": BETA, "label_smoothing": Parameter(1e-3, above=0, below=0.5)},
    needs=("reference",),
    scale=REWARD,
    loss=exo_loss,
    slopes=exo_slopes,
    target=cdpo_target,
)
DISCOPOP = LossSpec(
    name="discopop",
    paper="Lu et al. 2024, arXiv 2406.08414, eq. 5",
    formula="-(1-w) log σ(m) + w exp(-m), w = σ(m/τ)",
    gradient="w (1-w) [exp(-m) + log σ(m)] / τ - (1-w) σ(-m) - w exp(-m)",
    parameters={"beta": BETA, "tau": Parameter(0.05, above=0, most=1)},
    needs=("reference",),
    scale=REWARD,
    loss=discopop_loss,
    slopes=discopop_slopes,
)


def _reward_aware(
    name: str,
    formula: str,
    gradient: str,
    loss: Callable[[PairBatch, Values, Statistics], "torch.Tensor"],
    slopes: Callable[[PairBatch, Values, Statistics], Pair],
) -> LossSpec:
    """One of the three distances from the margin that the strength asks for."""
    return LossSpec(
        name=name,
        paper="Sun et al. 2025 (RPO), arXiv 2502.00203; Adler et al. 2024, arXiv 2406.11704",
        formula=formula,
        gradient=gradient,
        parameters={"beta": BETA, "eta": Parameter(1.0, above=0)},
        needs=("reference", "strength"),
        scale=REWARD,
        loss=loss,
        slopes=slopes,
    )


RPO_SQ = _reward_aware(
    "rpo_sq", "(m - g)², g = η strength", "2 (m - g)", rpo_sq_loss, rpo_sq_slopes
)
RPO_BWD_KL = _reward_aware(
    "rpo_bwd_kl",
    "KL(Bernoulli σ(g) ‖ Bernoulli σ(m)), g = η strength",
    "σ(m) - σ(g)",
    rpo_bwd_kl_loss,
    rpo_bwd_kl_slopes,
)
RPO_FWD_KL = _reward_aware(
    "rpo_fwd_kl",
    "KL(Bernoulli σ(m) ‖ Bernoulli σ(g)), g = η strength",
    "σ(m) σ(-m) (m - g)",
    rpo_fwd_kl_loss,
    rpo_fwd_kl_slopes,
)
FDPO_FORWARD_KL = LossSpec(
    name="fdpo_forward_kl",
    paper=f"{_F_DPO}, forward KL",
    formula="-log σ(m)",
    gradient="-σ(-m)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=Scale("β (1 - 1/u), u = exp(log-ratio)", _alpha_score, _alpha_slope),
    loss=fdpo_alpha_loss,
    slopes=fdpo_alpha_slopes,
    domain=_NO_OVERFLOW.replace("α × ", ""),
)
FDPO_ALPHA = LossSpec(
    name="fdpo_alpha",
    paper=f"{_F_DPO}, α-divergence",
    formula="-log σ(m)",
    gradient="-σ(-m)",
    parameters={"beta": BETA, "alpha": Parameter(0.5, above=0, below=1)},
    needs=("reference",),
    scale=Scale("β (1 - u^-α) / α, u = exp(log-ratio)", _alpha_score, _alpha_slope),
    loss=fdpo_alpha_loss,
    slopes=fdpo_alpha_slopes,
    domain=_NO_OVERFLOW,
)
FDPO_JS = LossSpec(
    name="fdpo_js",
    paper=f"{_F_DPO}, Jensen-Shannon",
    formula="-log σ(m)",
    gradient="-σ(-m)",
    parameters={"beta": BETA},
    needs=("reference",),
    scale=Scale(
        "β log(2u / (1 + u)), u = exp(log-ratio)",
        _js_score,
        lambda side, values: values["beta"] * sigmoid(-side.log_ratio),
    ),
    loss=fdpo_js_loss,
    slopes=fdpo_js_slopes,
)
