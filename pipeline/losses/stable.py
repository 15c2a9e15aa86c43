"""Functions that keep their relative precision, and their gradients', far out in both tails."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sigmoid(x: "torch.Tensor") -> "torch.Tensor":
    """1 / (1 + exp(-x)), of any shape.

    Autograd takes torch.sigmoid's slope as y * (1 - y), which is 0 once y rounds to 1: in float32
    from x = 17 on. Through the logarithm the slope keeps its precision until it underflows.
    """
    from torch.nn import functional as F

    return F.logsigmoid(x).exp()


def sigmoid_slope(x: "torch.Tensor") -> "torch.Tensor":
    """sigmoid(x) * sigmoid(-x), at most 1/4. Only exp(-|x|) is taken, so nothing overflows."""
    small = (-x.abs()).exp()
    return small / (1 + small) ** 2


def log1mexp(x: "torch.Tensor") -> "torch.Tensor":
    """log(1 - exp(x)) for x < 0 (Mächler 2012), with a finite gradient on either branch."""
    import torch

    half = -math.log(2)
    near, far = x.clamp(min=half), x.clamp(max=half)
    return torch.where(x > half, (-near.expm1()).log(), (-far.exp()).log1p())


def power(x: "torch.Tensor", c: float) -> "torch.Tensor":
    """(exp(c x) - 1) / c, and x itself for c = 0; held where exp would overflow."""
    return x if c == 0 else (c * x).clamp(max=_largest(x)).expm1() / c


def power_slope(x: "torch.Tensor", c: float) -> "torch.Tensor":
    """exp(c x), held where it would overflow: d `power` / dx below that."""
    return (c * x).clamp(max=_largest(x)).exp()


def power_difference(x: "torch.Tensor", y: "torch.Tensor", c: float) -> "torch.Tensor":
    """`power(x, c) - power(y, c)` without cancellation, held where exp would overflow."""
    import torch

    if c == 0:
        return x - y
    a, b = ((c * z).clamp(max=_largest(z)) for z in (x, y))
    apart = a - b
    # Near each other exp(a) - exp(b) is exp(b) (exp(a - b) - 1). Further off nothing cancels, and
    # the smaller one's gradient would be lost beside the larger one's.
    near = b.exp() * apart.clamp(-1, 1).expm1()
    return torch.where(apart.abs() < 1, near, a.exp() - b.exp()) / c


def bernoulli_kl(logit: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
    """KL of two coins with these log-odds, the first's share of heads being the weights, nats."""
    from torch.nn import functional as F

    heads = sigmoid(logit) * (F.logsigmoid(logit) - F.logsigmoid(other))
    return heads + sigmoid(-logit) * (F.logsigmoid(-logit) - F.logsigmoid(-other))


def _largest(x: "torch.Tensor") -> float:
    """An exponent of e that still leaves room for a few factors: 701 in float64."""
    import torch

    return math.log(torch.finfo(x.dtype).max) - 8
