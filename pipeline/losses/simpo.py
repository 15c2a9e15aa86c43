"""Losses without a reference: SimPO, CPO, SLiC-HF, AlphaPO, ORPO, TPO-L, and plain NLL."""

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
from pipeline.losses.dpo import logistic, opposite
from pipeline.losses.scales import (
    ALPHA_PROB,
    BETA_LOG_PROB,
    BETA_MEAN_LOG_PROB,
    LOG_ODDS,
    LOG_PROB,
    MEAN_LOG_PROB,
    log_odds,
)
from pipeline.losses.stable import power_difference, sigmoid

if TYPE_CHECKING:
    import torch


def _mean_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    return values["beta"] * (batch.chosen.mean_logprob - batch.rejected.mean_logprob)


def simpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * (mean log-prob chosen - rejected) - gamma) per pair, [B] (eq. 6).

    The means are over scored tokens, nats per token. Gamma is absolute, as in the paper; some
    implementations ask for gamma / beta instead (`simpo_ratio`).
    """
    return logistic(_mean_margin(batch, values) - values["gamma"])


def simpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(gamma - m)."""
    return opposite(-sigmoid(values["gamma"] - _mean_margin(batch, values)))


def _absolute(values: Values) -> Values:
    return {"beta": values["beta"], "gamma": values["beta"] * values["gamma_ratio"]}


def simpo_ratio_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """`simpo` with gamma = beta * gamma_ratio, [B]."""
    return simpo_loss(batch, _absolute(values), statistics)


def simpo_ratio_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(beta * gamma_ratio - m)."""
    return simpo_slopes(batch, _absolute(values), statistics)


def _sum_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    return values["beta"] * (batch.policy_chosen - batch.policy_rejected)


def cpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log sigmoid(beta * (log-prob chosen - rejected)) + nll_weight * NLL(chosen), [B] (eq. 3, 5).

    Both of sums over tokens, nats, as in the paper; TRL's NLL is a mean over the batch's tokens.
    """
    return logistic(_sum_margin(batch, values)) - values["nll_weight"] * batch.policy_chosen


def cpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(-m) - nll_weight / beta, and sigmoid(-m)."""
    weight = sigmoid(-_sum_margin(batch, values))
    return -weight - values["nll_weight"] / values["beta"], weight


def _short_of(batch: PairBatch, values: Values) -> "torch.Tensor":
    return values["delta"] - batch.policy_chosen + batch.policy_rejected


def slic_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """max(0, delta - log-prob chosen + rejected) + nll_weight * NLL(chosen), [B], nats (eq. 1).

    The paper regularises towards a reply of its choice; here that is the chosen one.
    """
    import torch

    return torch.relu(_short_of(batch, values)) - values["nll_weight"] * batch.policy_chosen


def slic_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-[m < delta] - nll_weight, and [m < delta]."""
    short = _short_of(batch, values)
    pulls = (short > 0).to(short.dtype)
    return -pulls - values["nll_weight"], pulls


def _alpha_margin(batch: PairBatch, values: Values) -> "torch.Tensor":
    chosen, rejected = batch.chosen.mean_logprob, batch.rejected.mean_logprob
    return values["beta"] * power_difference(chosen, rejected, -values["alpha"])


def alphapo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """SimPO with the reward (1 - p^-alpha) / alpha, p = exp(mean log-prob), [B]."""
    return logistic(_alpha_margin(batch, values) - values["gamma"])


def alphapo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-sigmoid(gamma - m)."""
    return opposite(-sigmoid(values["gamma"] - _alpha_margin(batch, values)))


def _odds_margin(batch: PairBatch) -> "torch.Tensor":
    chosen, rejected = batch.chosen, batch.rejected
    if not bool(((chosen.logprob < 0) & (rejected.logprob < 0)).all()):
        raise LossInputError("orpo takes odds of probabilities: each log-prob must be below 0")
    return log_odds(chosen) - log_odds(rejected)


def orpo_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-mean log-prob chosen - beta * log sigmoid(log-odds ratio) per pair, [B] (eq. 6, 7).

    Odds are of exp(mean log-prob per token); beta is the paper's lambda. The first term is per
    reply, of its own tokens; TRL's is a mean over the batch's tokens, prompts included.
    """
    odds = values["beta"] * logistic(_odds_margin(batch))
    return odds - batch.chosen.mean_logprob


def orpo_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-(1 - p_w) - beta sigmoid(-m), and beta sigmoid(-m)."""
    weight = values["beta"] * sigmoid(-_odds_margin(batch))
    return batch.chosen.mean_logprob.expm1() - weight, weight


def tpo_l_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """`simpo` and nll_weight times the gold reply's NLL per token, [B]."""
    gold = batch.column("gold_logprob") / batch.column("n_gold")
    return simpo_loss(batch, values, statistics) - values["nll_weight"] * gold


def nll_sum_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log-prob of the chosen reply, [B], nats."""
    return -batch.policy_chosen


def nll_mean_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-mean log-prob of the chosen reply, [B], nats per token: every reply counts the same."""
    return -batch.chosen.mean_logprob


def nll_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-1 and 0."""
    import torch

    return -torch.ones_like(batch.policy_chosen), torch.zeros_like(batch.policy_chosen)


def token_statistic(batch: PairBatch, values: Values, before: Statistics) -> Statistics:
    """`tokens`: scored tokens of a chosen reply, the mean over the batch."""
    return {"tokens": batch.n_chosen.mean().item()}


def nll_token_mean_loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
    """-log-prob of the chosen reply / mean tokens, [B]: its mean is that over the batch's tokens.

    Every token counts the same, so a long reply counts more; TRL's `sft` and `rpo_alpha`.
    """
    return -batch.policy_chosen / statistics["tokens"]


def nll_token_mean_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
    """-1 / mean tokens and 0."""
    chosen, rejected = nll_slopes(batch, values, statistics)
    return chosen / statistics["tokens"], rejected


def _simpo_target(values: Values) -> Target:
    # The margin it asks for, where the loss is ln 2; beyond it the loss goes on falling.
    return Target(values["gamma"] / values["beta"], "nats per token")


_SIMPO_BETA = Parameter(2.0, above=0)
_GAMMA = Parameter(1.0, least=0)  # gamma / beta = 0.5, inside the paper's grid of 0 to 1
_NLL_WEIGHT = Parameter(1.0, least=0)

SIMPO = LossSpec(
    name="simpo",
    paper="Meng et al. 2024, arXiv 2405.14734, eq. 6",
    formula="-log σ(m - γ)",
    gradient="-σ(γ - m)",
    parameters={"beta": _SIMPO_BETA, "gamma": _GAMMA},
    needs=("lengths",),
    scale=BETA_MEAN_LOG_PROB,
    loss=simpo_loss,
    slopes=simpo_slopes,
    target=_simpo_target,
)
SIMPO_RATIO = LossSpec(
    name="simpo_ratio",
    paper="Meng et al. 2024, arXiv 2405.14734, eq. 6, with γ / β as in its repository",
    formula="-log σ(m - β gamma_ratio)",
    gradient="-σ(β gamma_ratio - m)",
    parameters={"beta": _SIMPO_BETA, "gamma_ratio": Parameter(0.5, least=0)},
    needs=("lengths",),
    scale=BETA_MEAN_LOG_PROB,
    loss=simpo_ratio_loss,
    slopes=simpo_ratio_slopes,
    target=lambda values: Target(values["gamma_ratio"], "nats per token"),
)
CPO = LossSpec(
    name="cpo",
    paper="Xu et al. 2024, arXiv 2401.08417",
    formula="-log σ(m) - nll_weight log-prob_w",
    gradient="chosen -σ(-m) - nll_weight/β, rejected σ(-m)",
    parameters={"beta": Parameter(0.1, above=0), "nll_weight": _NLL_WEIGHT},
    needs=(),
    scale=BETA_LOG_PROB,
    loss=cpo_loss,
    slopes=cpo_slopes,
)
SLIC = LossSpec(
    name="slic",
    paper="Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, eq. 1",
    formula="max(0, δ - m) - nll_weight s_w",
    gradient="chosen -[m < δ] - nll_weight, rejected [m < δ]",
    parameters={"delta": Parameter(1.0, above=0), "nll_weight": Parameter(0.1, least=0)},
    needs=(),
    scale=LOG_PROB,
    loss=slic_loss,
    slopes=slic_slopes,
)
ALPHAPO = LossSpec(
    name="alphapo",
    paper="Gupta et al. 2025, arXiv 2501.03884",
    formula="-log σ(m - γ)",
    gradient="-σ(γ - m)",
    parameters={
        "beta": _SIMPO_BETA,
        "gamma": _GAMMA,
        "alpha": Parameter(0.25, least=-5, most=5),
    },
    needs=("lengths",),
    scale=ALPHA_PROB,
    loss=alphapo_loss,
    slopes=alphapo_slopes,
    domain="-α × mean log-prob ≤ 701 (beyond, the score is held there)",
)
ORPO = LossSpec(
    name="orpo",
    paper="Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7",
    formula="-mean log-prob_w - β log σ(m)",
    gradient="chosen -(1-p_w) - β σ(-m), rejected β σ(-m)",
    parameters={"beta": Parameter(0.1, least=0)},
    needs=("lengths",),
    scale=LOG_ODDS,
    loss=orpo_loss,
    slopes=orpo_slopes,
    domain="log-probs < 0",
)
TPO_L = LossSpec(
    name="tpo_l",
    paper="Saeidi et al. 2024 (TPO), arXiv 2405.16681",
    formula="-log σ(m - γ) - nll_weight mean log-prob of the gold reply",
    gradient="-σ(γ - m)",
    parameters={"beta": _SIMPO_BETA, "gamma": _GAMMA, "nll_weight": _NLL_WEIGHT},
    needs=("lengths", "gold"),
    scale=BETA_MEAN_LOG_PROB,
    loss=tpo_l_loss,
    slopes=simpo_slopes,
    target=_simpo_target,
)
_NLL = "maximum likelihood of the chosen reply"
NLL_SUM = LossSpec(
    name="nll_sum",
    paper=f"{_NLL}, per reply",
    formula="-s_w",
    gradient="chosen -1, rejected 0",
    parameters={},
    needs=(),
    scale=LOG_PROB,
    loss=nll_sum_loss,
    slopes=nll_slopes,
)
NLL_MEAN = LossSpec(
    name="nll_mean",
    paper=f"{_NLL}, per token of each reply",
    formula="-s_w",
    gradient="chosen -1, rejected 0",
    parameters={},
    needs=("lengths",),
    scale=MEAN_LOG_PROB,
    loss=nll_mean_loss,
    slopes=nll_slopes,
)
NLL_TOKEN_MEAN = LossSpec(
    name="nll_token_mean",
    paper=f"{_NLL}, per token of the batch, as TRL's sft",
    formula="-s_w / mean n_w",
    gradient="chosen -1 / mean n_w, rejected 0",
    parameters={},
    needs=("lengths", "batch"),
    scale=LOG_PROB,
    loss=nll_token_mean_loss,
    slopes=nll_token_mean_slopes,
    statistic=token_statistic,
)
