"""The logistic function and its slope, exact in relative terms in both tails."""

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    import torch


def sigmoid(x: "torch.Tensor") -> "torch.Tensor":
    """1 / (1 + exp(-x)), of any shape.

    Autograd takes torch.sigmoid's slope as y * (1 - y), which is 0 once y rounds to 1: in float32
    from x = 17 on. Through the logarithm the slope keeps its precision until it underflows.
    """
    from torch.nn import functional as F

    return F.logsigmoid(x).exp()


def sigmoid_slope(x: pl.Expr) -> pl.Expr:
    """sigmoid(x) * sigmoid(-x), at most 1/4. Only exp(-|x|) is taken, so nothing overflows."""
    small = (-x.abs()).exp()
    return small / (1 + small) ** 2
