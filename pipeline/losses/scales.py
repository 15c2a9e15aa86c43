"""How losses score a reply: of its log-ratio or its log-prob, as a sum or as a mean per token."""

from typing import TYPE_CHECKING

from pipeline.losses.base import Scale, Side
from pipeline.losses.stable import log1mexp, power, power_slope

if TYPE_CHECKING:
    import torch


def _full(side: Side, value: float) -> "torch.Tensor":
    import torch

    return torch.full_like(side.logprob, value)


REWARD = Scale(
    "β × log-ratio",
    lambda side, values: values["beta"] * side.log_ratio,
    lambda side, values: _full(side, values["beta"]),
)
MEAN_REWARD = Scale(
    "β × mean log-ratio",
    lambda side, values: values["beta"] * side.mean_log_ratio,
    lambda side, values: values["beta"] / side.n,
)
LOG_RATIO = Scale(
    "log-ratio, nats",
    lambda side, values: side.log_ratio,
    lambda side, values: _full(side, 1.0),
)
MEAN_LOG_RATIO = Scale(
    "mean log-ratio, nats per token",
    lambda side, values: side.mean_log_ratio,
    lambda side, values: 1 / side.n,
)
LOG_PROB = Scale(
    "log-prob, nats",
    lambda side, values: side.logprob,
    lambda side, values: _full(side, 1.0),
)
MEAN_LOG_PROB = Scale(
    "mean log-prob, nats per token",
    lambda side, values: side.mean_logprob,
    lambda side, values: 1 / side.n,
)
BETA_LOG_PROB = Scale(
    "β × log-prob",
    lambda side, values: values["beta"] * side.logprob,
    lambda side, values: _full(side, values["beta"]),
)
BETA_MEAN_LOG_PROB = Scale(
    "β × mean log-prob",
    lambda side, values: values["beta"] * side.logprob / side.n,
    lambda side, values: values["beta"] / side.n,
)
ALPHA_PROB = Scale(
    "β (1 - p^-α) / α, p = exp(mean log-prob)",
    lambda side, values: values["beta"] * power(side.mean_logprob, -values["alpha"]),
    lambda side, values: values["beta"] / side.n * power_slope(side.mean_logprob, -values["alpha"]),
)
LOG_ODDS = Scale(
    "log-odds of p = exp(mean log-prob)",
    lambda side, values: log_odds(side),
    lambda side, values: 1 / (side.n * -side.mean_logprob.expm1()),
)


def log_odds(side: Side) -> "torch.Tensor":
    """Log p - log(1 - p) of p = exp(mean log-prob), which must be below 1."""
    return side.mean_logprob - log1mexp(side.mean_logprob)
