"""DPO against plain float64 formulas, the lecture's example and autograd."""

import math

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.losses import REGISTRY, PairBatch
from pipeline.losses.dpo import dpo_loss

LOGPS = st.floats(-500, 0)


def batch(pc: float, pr: float, rc: float, rr: float) -> PairBatch:
    return PairBatch(*[torch.tensor([x], dtype=torch.float64) for x in (pc, pr, rc, rr)])


def formula(pc: float, pr: float, rc: float, rr: float, beta: float) -> float:
    m = beta * ((pc - rc) - (pr - rr))
    return max(-m, 0.0) + math.log1p(math.exp(-abs(m)))


@given(LOGPS, LOGPS, LOGPS, LOGPS, st.floats(0.01, 5))
def test_dpo_is_minus_log_sigmoid_of_the_margin(
    pc: float, pr: float, rc: float, rr: float, beta: float
) -> None:
    found = dpo_loss(batch(pc, pr, rc, rr), beta).item()
    assert found == pytest.approx(formula(pc, pr, rc, rr, beta), rel=1e-9, abs=1e-300)


def test_the_lectures_example() -> None:
    """Section 9: three pairs, beta 0.1; margins of log-ratios are 0.6, 0.4 and 0.5 nats."""
    values = [
        [-2.5, -3.0, -2.8],  # policy, chosen
        [-3.5, -4.0, -3.8],  # policy, rejected
        [-2.8, -3.2, -3.0],  # reference, chosen
        [-3.2, -3.8, -3.5],  # reference, rejected
    ]
    tensors = [torch.tensor(x, dtype=torch.float64) for x in values]
    found = dpo_loss(PairBatch(*tensors), 0.1).mean().item()
    expected = sum(math.log1p(math.exp(-0.1 * h)) for h in (0.6, 0.4, 0.5)) / 3
    assert found == pytest.approx(expected, rel=1e-12)
    control = dpo_loss(PairBatch(tensors[0], tensors[1], tensors[3], tensors[2]), 0.1).mean()
    assert abs(control.item() - expected) > 1e-2, "a swapped reference must not give this number"


def test_policy_equal_to_reference_is_ln_2() -> None:
    assert dpo_loss(batch(-7.0, -3.0, -7.0, -3.0), 0.3).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("h", [-800.0, -3.0, 0.0, 2.5, 800.0])
def test_the_registered_gradient_weight_is_autograds(h: float) -> None:
    beta = 0.7
    policy = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    torch.autograd.backward(dpo_loss(PairBatch(policy, zero, zero, zero), beta))
    assert policy.grad is not None
    spec = REGISTRY["dpo"]
    margin = spec.score(pl.lit(h), pl.lit(0.0), pl.lit(1), beta)
    weight = pl.select(spec.gradient_weight(margin)).item()
    assert beta * weight == pytest.approx(-policy.grad.item(), rel=1e-9, abs=1e-300)
