"""Every loss against its paper's formula in 400 digits, with wrong forms that must differ."""

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from typing import NamedTuple

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.losses import REGISTRY, PairBatch
from pipeline.losses.kto import kto_loss

LOGPS = st.floats(-500, 0)
N_TOKENS = st.integers(1, 400).map(float)
KL = st.floats(-20, 20)
RANGES = {
    "beta": st.floats(0.01, 10),
    "gamma": st.floats(0, 5),
    "desirable_weight": st.floats(0.1, 3),
    "undesirable_weight": st.floats(0.1, 3),
}


class Pair(NamedTuple):
    """The fields of a `PairBatch`, of one pair."""

    policy_chosen: float
    policy_rejected: float
    reference_chosen: float
    reference_rejected: float
    n_chosen: float = 1.0
    n_rejected: float = 1.0


PAIRS = st.builds(Pair, LOGPS, LOGPS, LOGPS, LOGPS, N_TOKENS, N_TOKENS)
A_PAIR = Pair(-20.0, -31.0, -38.0, -29.5, 7.0, 12.0)

Exact = Mapping[str, Decimal]
"""A pair's fields, a loss's values and `kl` by name."""


def sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def h_chosen(x: Exact) -> Decimal:
    return x["policy_chosen"] - x["reference_chosen"]


def h_rejected(x: Exact) -> Decimal:
    return x["policy_rejected"] - x["reference_rejected"]


def dpo(x: Exact) -> Decimal:
    return -sigmoid(x["beta"] * (h_chosen(x) - h_rejected(x))).ln()


def ipo(x: Exact) -> Decimal:
    return (h_chosen(x) - h_rejected(x) - 1 / (2 * x["beta"])) ** 2


def ipo_mean(x: Exact) -> Decimal:
    h = h_chosen(x) / x["n_chosen"] - h_rejected(x) / x["n_rejected"]
    return (h - 1 / (2 * x["beta"])) ** 2


def simpo(x: Exact) -> Decimal:
    chosen = x["beta"] / x["n_chosen"] * x["policy_chosen"]
    rejected = x["beta"] / x["n_rejected"] * x["policy_rejected"]
    return -sigmoid(chosen - rejected - x["gamma"]).ln()


def kto(x: Exact) -> Decimal:
    """lambda_y - v(x, y) of the paper, the mean over a desirable and an undesirable row."""
    z0 = max(Decimal(0), x["kl"])
    value_desirable = x["desirable_weight"] * sigmoid(x["beta"] * (h_chosen(x) - z0))
    value_undesirable = x["undesirable_weight"] * sigmoid(x["beta"] * (z0 - h_rejected(x)))
    weights = x["desirable_weight"] + x["undesirable_weight"]
    return (weights - value_desirable - value_undesirable) / 2


def lecture_ipo(x: Exact) -> Decimal:
    return (x["beta"] * h_chosen(x) - x["beta"] * h_rejected(x) - 1 / x["beta"]) ** 2


def lecture_kto(x: Exact) -> Decimal:
    return 1 - sigmoid(x["beta"] * h_chosen(x)) + sigmoid(x["beta"] * h_rejected(x))


FORMULAS: dict[str, Callable[[Exact], Decimal]] = {
    form.__name__: form for form in (dpo, ipo, ipo_mean, simpo, kto, lecture_ipo, lecture_kto)
}
# d score / d log-prob of a side, by hand, of beta and the side's scored tokens.
SLOPES: dict[str, Callable[[float, float], float]] = {
    "dpo": lambda beta, n: beta,
    "ipo": lambda beta, n: 1.0,
    "ipo_mean": lambda beta, n: 1 / n,
    "simpo": lambda beta, n: beta / n,
    "kto": lambda beta, n: beta,
    "lecture_ipo": lambda beta, n: beta,
    "lecture_kto": lambda beta, n: beta,
}
STEP = Decimal("1e-30")
# Float64 knows a log-ratio of 1e4 nats to 2e-12 only, and so its distance from a target.
NEAR_ZERO = {"ipo": 1e-10, "ipo_mean": 1e-10, "lecture_ipo": 1e-9}


def exact(
    name: str, pair: Pair, values: Mapping[str, float], kl: float = 0.0, **moved: Decimal
) -> Decimal:
    """The paper's formula at these very floats, in 400 digits; `moved` is added to a field."""
    with localcontext(prec=400):
        numbers = {**pair._asdict(), **values, "kl": kl}
        return FORMULAS[name]({key: Decimal(x) + moved.get(key, 0) for key, x in numbers.items()})


def exact_slopes(
    name: str, pair: Pair, values: Mapping[str, float], kl: float = 0.0
) -> tuple[float, float]:
    """DLoss/d policy log-prob, chosen and rejected: central differences, exact to 1e-50."""

    def slope(key: str) -> float:
        above, below = (exact(name, pair, values, kl, **{key: step}) for step in (STEP, -STEP))
        with localcontext(prec=400):
            return float((above - below) / (2 * STEP))

    return slope("policy_chosen"), slope("policy_rejected")


def score_slopes(
    name: str, pair: Pair, values: Mapping[str, float], slopes: tuple[float, float]
) -> tuple[float, float]:
    """|dLoss/d score| of either side."""
    chosen, rejected = (SLOPES[name](values["beta"], n) for n in (pair.n_chosen, pair.n_rejected))
    return abs(slopes[0]) / chosen, abs(slopes[1]) / rejected


def as_batch(pair: Pair, dtype: torch.dtype = torch.float64) -> PairBatch:
    return PairBatch(*[torch.tensor([x], dtype=dtype) for x in pair])


def loss_of(
    name: str,
    pair: Pair,
    values: Mapping[str, float],
    kl: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> float:
    spec = REGISTRY[name]
    losses = spec.loss(as_batch(pair, dtype), values, {"kl": kl} if spec.needs_kl else {})
    assert losses.shape == (1,)
    assert losses.dtype == dtype
    return losses.item()


def gradients(
    name: str,
    pair: Pair,
    values: Mapping[str, float],
    kl: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, float]:
    """Autograd's dLoss/d policy log-prob, chosen and rejected."""
    batch = as_batch(pair, dtype)
    sides = (batch.policy_chosen.requires_grad_(), batch.policy_rejected.requires_grad_())
    loss = REGISTRY[name].loss(batch, values, {"kl": kl}).sum()
    chosen, rejected = torch.autograd.grad(loss, sides)
    return chosen.item(), rejected.item()


def weight_of(name: str, pair: Pair, values: Mapping[str, float], kl: float = 0.0) -> float:
    """The registered gradient weight, the way the reward table asks for it."""
    spec = REGISTRY[name]
    frame = pl.DataFrame({key: [x] for key, x in pair._asdict().items()}).cast(
        {"n_chosen": pl.Int64, "n_rejected": pl.Int64}
    )
    chosen, rejected = (
        spec.score(
            pl.col(f"policy_{side}") - pl.col(f"reference_{side}"),
            pl.col(f"policy_{side}"),
            pl.col(f"n_{side}"),
            values,
        )
        for side in ("chosen", "rejected")
    )
    return float(frame.select(spec.gradient_weight(chosen, rejected, values, {"kl": kl})).item())


EXTREMES = [
    (Pair(chosen, rejected, 0.0, 0.0, n, n), beta)
    for chosen, rejected in (
        *[(0.0, 0.0), (1e4, 0.0), (-1e4, 0.0), (0.0, 1e4), (0.0, -1e4)],
        *[(5e3, -5e3), (-5e3, 5e3), (740.0, 0.0), (-740.0, 0.0), (30.0, -30.0)],
    )
    for beta in (1e-3, 0.1, 10.0)
    for n in (1.0, 400.0)
]


def test_the_registry_holds_these_losses_and_no_others() -> None:
    assert set(REGISTRY) == set(FORMULAS)
    assert all(spec.name == name for name, spec in REGISTRY.items())
    assert {name: dict(spec.defaults) for name, spec in REGISTRY.items()} == {
        "dpo": {"beta": 0.1},
        "ipo": {"beta": 0.1},
        "ipo_mean": {"beta": 0.1},
        "simpo": {"beta": 2.0, "gamma": 1.0},
        "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "lecture_ipo": {"beta": 0.1},
        "lecture_kto": {"beta": 0.1},
    }


def test_the_losses_are_known_without_torch() -> None:
    code = "import sys, pipeline.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", REGISTRY)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_losses_gradients_and_weights_are_the_papers(name: str, data: st.DataObject) -> None:
    pair, kl = data.draw(PAIRS), data.draw(KL)
    values = {key: data.draw(RANGES[key]) for key in REGISTRY[name].defaults}
    near_zero = NEAR_ZERO.get(name, 1e-300)
    expected = float(exact(name, pair, values, kl))
    assert loss_of(name, pair, values, kl) == pytest.approx(expected, rel=1e-9, abs=near_zero)
    slopes = exact_slopes(name, pair, values, kl)
    assert gradients(name, pair, values, kl) == pytest.approx(slopes, rel=1e-9, abs=near_zero)
    weight = sum(score_slopes(name, pair, values, slopes)) / 2
    assert weight_of(name, pair, values, kl) == pytest.approx(weight, rel=1e-9, abs=near_zero)


@pytest.mark.parametrize("name", REGISTRY)
def test_far_from_rest_nothing_overflows_and_tails_keep_their_precision(name: str) -> None:
    near_zero = NEAR_ZERO.get(name, 1e-300)
    for pair, beta in EXTREMES:
        values = {**REGISTRY[name].defaults, "beta": beta}
        expected = float(exact(name, pair, values))
        assert loss_of(name, pair, values) == pytest.approx(expected, rel=1e-9, abs=near_zero)
        found32 = loss_of(name, pair, values, dtype=torch.float32)
        assert found32 == pytest.approx(expected, rel=2e-5, abs=1e-36)
        slopes = exact_slopes(name, pair, values)
        assert gradients(name, pair, values) == pytest.approx(slopes, rel=1e-9, abs=near_zero)
        found32s = gradients(name, pair, values, dtype=torch.float32)
        assert found32s == pytest.approx(slopes, rel=2e-5, abs=1e-36)
        weight = sum(score_slopes(name, pair, values, slopes)) / 2
        assert weight_of(name, pair, values) == pytest.approx(weight, rel=1e-9, abs=near_zero)


def test_in_float32_a_lost_pair_still_has_a_gradient() -> None:
    pair, values = Pair(-250.0, -9.0, 0.0, -9.0), REGISTRY["kto"].defaults
    expected, _ = exact_slopes("kto", pair, values)
    found, _ = gradients("kto", pair, values, dtype=torch.float32)
    assert found == pytest.approx(expected, rel=1e-5)
    x = torch.tensor(25.0, requires_grad=True)
    torch.autograd.backward(torch.sigmoid(x))
    assert x.grad == 0, "torch's own sigmoid must lose it, or ours is not needed"


SWAPPED: dict[str, Pair] = {
    "reference": A_PAIR._replace(reference_chosen=-29.5, reference_rejected=-38.0),
    "policy": A_PAIR._replace(policy_chosen=-31.0, policy_rejected=-20.0),
    "lengths": A_PAIR._replace(n_chosen=12.0, n_rejected=7.0),
}
MEANS = ("ipo_mean", "simpo")


@pytest.mark.parametrize("name", REGISTRY)
def test_the_check_against_the_formula_sees_a_wrong_input(name: str) -> None:
    spec = REGISTRY[name]
    values = spec.defaults
    expected = float(exact(name, A_PAIR, values, kl=1.5))
    assert loss_of(name, A_PAIR, values, kl=1.5) == pytest.approx(expected, rel=1e-9)
    for swap, pair in SWAPPED.items():
        # A loss of sums must not see the lengths, one without reference not the reference.
        blind = (swap == "lengths" and name not in MEANS) or (
            swap == "reference" and not spec.needs_reference
        )
        found = loss_of(name, pair, values, kl=1.5)
        assert (abs(found / expected - 1) < 1e-9) == blind, swap
    for key in values:
        wrong = loss_of(name, A_PAIR, {**values, key: 1.1 * values[key]}, kl=1.5)
        assert abs(wrong / expected - 1) > 1e-4, key
    for other in set(REGISTRY) - {name}:
        wrong = loss_of(other, A_PAIR, {**REGISTRY[other].defaults, **values}, kl=1.5)
        assert abs(wrong / expected - 1) > 1e-4, other


@pytest.mark.parametrize("name", REGISTRY)
def test_the_check_of_the_weight_sees_one_side_taken_for_both(name: str) -> None:
    values = REGISTRY[name].defaults
    expected = weight_of(name, A_PAIR, values, kl=1.5)
    slopes = exact_slopes(name, A_PAIR, values, kl=1.5)
    chosen, rejected = score_slopes(name, A_PAIR, values, slopes)
    both_alike = name not in ("kto", "lecture_kto")
    assert (abs(chosen / expected - 1) < 1e-9) == both_alike
    assert (abs(rejected / expected - 1) < 1e-9) == both_alike
    assert (chosen + rejected) / expected == pytest.approx(2), "the sum of the sides is twice it"


@pytest.mark.parametrize("name", REGISTRY)
def test_scores_are_arithmetic_for_numbers_tensors_and_expressions(name: str) -> None:
    spec = REGISTRY[name]
    logratio, logprob, n = 4.0, -20.0, 7
    of = logprob if name == "simpo" else logratio
    expected = SLOPES[name](spec.defaults["beta"], n) * of
    tensor = torch.tensor([logratio, logprob, n], dtype=torch.float64)
    expressions = (pl.lit(logratio), pl.lit(logprob), pl.lit(n))
    for found in (
        spec.score(logratio, logprob, n, spec.defaults),
        spec.score(tensor[0], tensor[1], tensor[2], spec.defaults).item(),
        pl.select(spec.score(*expressions, spec.defaults)).item(),
    ):
        assert found == pytest.approx(expected, rel=1e-12)


@given(PAIRS, st.floats(0.01, 10))
def test_the_lectures_ipo_is_the_papers_at_half_beta_squared(pair: Pair, beta: float) -> None:
    lecture = loss_of("lecture_ipo", pair, {"beta": beta})
    paper = beta**2 * loss_of("ipo", pair, {"beta": beta**2 / 2})
    assert lecture == pytest.approx(paper, rel=1e-9, abs=1e-9)


@given(PAIRS, st.floats(0.01, 10))
def test_the_lectures_kto_is_twice_the_papers_at_z0_0(pair: Pair, beta: float) -> None:
    values = {**REGISTRY["kto"].defaults, "beta": beta}
    lecture = loss_of("lecture_kto", pair, {"beta": beta})
    assert lecture == pytest.approx(2 * loss_of("kto", pair, values, kl=0.0), rel=1e-9, abs=1e-300)


def test_targets_as_numbers_and_as_text() -> None:
    found = {
        name: str(spec.target({**spec.defaults, "beta": 0.1})) for name, spec in REGISTRY.items()
    }
    assert found == {
        "dpo": "None",
        "ipo": "5 nats",
        "ipo_mean": "5 nats per token",
        "simpo": "10 nats per token",
        "kto": "None",
        "lecture_ipo": "100 nats",
        "lecture_kto": "None",
    }
    assert str(REGISTRY["simpo"].target(REGISTRY["simpo"].defaults)) == "0.5 nats per token"


@pytest.mark.parametrize("name", ["ipo", "ipo_mean", "lecture_ipo"])
@pytest.mark.parametrize("beta", [0.02, 0.1, 1.3])
def test_an_ipo_loss_has_its_minimum_at_its_target(name: str, beta: float) -> None:
    target = REGISTRY[name].target({"beta": beta})
    assert target is not None

    def at(margin: float) -> float:
        n = 7.0 if target.unit == "nats per token" else 1.0
        pair = Pair(-50.0 + margin * n, -40.0, -50.0, -40.0, 7.0, 12.0)
        return loss_of(name, pair, {"beta": beta})

    assert at(target.nats) == pytest.approx(0, abs=1e-18 * target.nats**2)
    assert at(target.nats * 0.99) > 1e-6
    assert at(target.nats * 1.01) > 1e-6


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_simpo_is_ln_2_at_its_target(gamma: float) -> None:
    values = {"beta": 2.0, "gamma": gamma}
    target = REGISTRY["simpo"].target(values)
    assert target is not None
    at_target = Pair(-14.0 + 7 * target.nats, -24.0, 0.0, 0.0, 7.0, 12.0)
    assert loss_of("simpo", at_target, values) == pytest.approx(math.log(2), rel=1e-12)
    beyond = at_target._replace(policy_chosen=at_target.policy_chosen + 1)
    assert loss_of("simpo", beyond, values) < math.log(2) - 0.1, "it goes on falling"


@given(PAIRS, LOGPS, LOGPS)
def test_the_reference_does_not_enter_simpo(pair: Pair, chosen: float, rejected: float) -> None:
    values = REGISTRY["simpo"].defaults
    other = pair._replace(reference_chosen=chosen, reference_rejected=rejected)
    assert loss_of("simpo", other, values) == loss_of("simpo", pair, values)


def test_kto_clamps_a_negative_kl_at_0_and_hides_no_nan() -> None:
    values = REGISTRY["kto"].defaults
    at_0 = loss_of("kto", A_PAIR, values, kl=0.0)
    assert loss_of("kto", A_PAIR, values, kl=-3.0) == at_0
    assert weight_of("kto", A_PAIR, values, kl=-3.0) == weight_of("kto", A_PAIR, values, kl=0.0)
    assert abs(loss_of("kto", A_PAIR, values, kl=3.0) - at_0) > 1e-3
    assert math.isnan(loss_of("kto", A_PAIR, values, kl=math.nan))
    with pytest.raises(KeyError, match="kl"):
        kto_loss(as_batch(A_PAIR), values, {})
