"""Every loss against its paper's formula in 80 digits, with wrong forms that must differ."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_pairs import A_PAIR, SIDES, STATISTICS, Numbers, a_pair, batch_of, gradients
from papers import DIGITS, FORMULAS, SCORES, exact, slope

from pipeline.losses import NEEDS, REGISTRY, LossInputError, LossSpec, PairBatch
from pipeline.losses.kto import kto_loss

SORTING = ("aot", "aot_unpaired")
"""Losses of a pair among others; `test_batch_losses` has them."""
ALONE = [name for name in REGISTRY if name not in SORTING]
RANGES: dict[str, tuple[float, float]] = {
    "beta": (0.01, 10),
    "gamma": (0, 5),
    "gamma_ratio": (0, 2),
    "alpha": (0.05, 0.95),
    "tau": (0.02, 1),
    "label_smoothing": (1e-3, 0.49),
    "penalty": (0, 100),
    "eta": (0.1, 3),
    "delta": (0.1, 5),
    "nll_weight": (0, 2),
    "desirable_weight": (0.1, 3),
    "undesirable_weight": (0.1, 3),
}
# Float64 knows a log-ratio of 1e4 nats to 2e-12 only, and so its distance from a target; a loss of
# several terms is known to its terms' last digits, where it is small beside them.
NEAR_ZERO = {
    **dict.fromkeys(("ipo", "ipo_mean", "sppo_hard"), 1e-10),
    **dict.fromkeys(("lecture_ipo", "rpo_sq"), 1e-9),
    **dict.fromkeys(("robust", "exo_pair", "rpo_bwd_kl", "rpo_fwd_kl"), 1e-11),
    **dict.fromkeys(("cdpo", "apo_down", "nca_pair"), 1e-12),
    # exp(700) beside exp(-700) leaves so much of 400 digits.
    **dict.fromkeys(("fdpo_forward_kl", "fdpo_alpha", "fdpo_js", "alphapo"), 1e-60),
}


def close(found: float, expected: float, name: str, relative: float = 1e-9) -> bool:
    return found == pytest.approx(expected, rel=relative, abs=NEAR_ZERO.get(name, 1e-300))


def a_case(generator: np.random.Generator, spec: LossSpec) -> tuple[Numbers, Numbers]:
    """Values and statistics."""
    values = {name: float(generator.uniform(*RANGES[name])) for name in spec.parameters}
    statistics = {
        "kl": generator.uniform(-20, 20),
        "shift": generator.uniform(-5, 5),
        "surplus": generator.uniform(-20, 20),
        "tokens": generator.uniform(1, 400),
    }
    return values, statistics


def check(
    name: str,
    pairs: Sequence[Numbers],
    values: Numbers,
    statistics: Numbers,
    digits: int = DIGITS,
) -> None:
    """Loss, scores, gradients of autograd and in closed form, and the weight, against the paper."""
    spec, form = REGISTRY[name], FORMULAS[name]
    batch = batch_of(pairs)
    losses = spec.loss(batch, values, statistics)
    assert losses.dtype == torch.float64
    assert losses.shape == (len(pairs),)
    scores = [side.tolist() for side in spec.scores(batch, values)]
    closed = [side.tolist() for side in spec.logprob_slopes(batch, values, statistics)]
    weights = spec.gradient_weight(batch, values, statistics).tolist()
    autograd = gradients(spec, batch_of(pairs), values, statistics)
    for row, pair in enumerate(pairs):
        numbers = {**pair, **values, **statistics}
        assert close(losses[row].item(), exact(form, numbers, digits), name), numbers
        pulls = []
        for k, side in enumerate(SIDES):
            expected = slope(form, numbers, f"policy_{side}", digits)
            assert close(autograd[k][row], expected, name), (side, numbers)
            assert close(closed[k][row], expected, name), (side, numbers)

            def score(x: Any, side: str = side) -> Any:
                return SCORES[name](x, side)

            found = scores[k][row]
            assert found == pytest.approx(exact(score, numbers, digits), rel=1e-9, abs=1e-12)
            per_nat = slope(score, numbers, f"policy_{side}", digits)
            pulls.append(abs(expected) / per_nat if per_nat > 1e-200 else None)
        if None not in pulls:  # a score that has stopped growing tells no weight
            assert close(weights[row], sum(p for p in pulls if p is not None) / 2, name), numbers


def test_the_registry_holds_these_losses_and_no_others() -> None:
    assert set(REGISTRY) == {*FORMULAS, *SORTING}
    assert all(spec.name == name for name, spec in REGISTRY.items())
    for spec in REGISTRY.values():
        assert set(spec.needs) <= set(NEEDS)
        assert all(spec.parameters[p].allows(v) for p, v in spec.defaults.items())
        assert all(not p.allows(math.nan) for p in spec.parameters.values())
    # What policies that are trained already were trained with.
    assert {name: REGISTRY[name].defaults for name in ("dpo", "ipo", "simpo", "kto")} == {
        "dpo": {"beta": 0.1},
        "ipo": {"beta": 0.1},
        "simpo": {"beta": 2.0, "gamma": 1.0},
        "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    }


def test_the_losses_are_known_without_torch() -> None:
    code = "import sys, pipeline.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ALONE)
def test_losses_gradients_and_weights_are_the_papers(name: str) -> None:
    """Of 208 random pairs, half of them near rest, where a loss turns."""
    generator = np.random.default_rng(11)
    for near in (True, False) * 13:
        largest = 3.0 if near else 30.0 if name in OVERFLOWS else 500.0
        values, statistics = a_case(generator, REGISTRY[name])
        check(name, [a_pair(generator, largest) for _ in range(8)], values, statistics)


def test_alphapo_without_alpha_is_simpo() -> None:
    generator = np.random.default_rng(2)
    batch, values = batch_of([a_pair(generator) for _ in range(5)]), {"beta": 2.0, "gamma": 0.3}
    simpo, alphapo = REGISTRY["simpo"], REGISTRY["alphapo"]
    plain = {**values, "alpha": 0.0}
    assert alphapo.loss(batch, plain, {}).tolist() == simpo.loss(batch, values, {}).tolist()
    for ours, theirs in zip(
        (*alphapo.scores(batch, plain), *alphapo.logprob_slopes(batch, plain, {})),
        (*simpo.scores(batch, values), *simpo.logprob_slopes(batch, values, {})),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert alphapo.loss(batch, {**values, "alpha": 0.01}, {}).tolist() != pytest.approx(
        simpo.loss(batch, values, {}).tolist(), rel=1e-6
    )


def moved(chosen: float, rejected: float, n: float) -> Numbers:
    """A pair whose policy is so many nats above its reference; without one, below 0."""
    plain = a_pair(np.random.default_rng(1))
    sums = {"policy_chosen": chosen, "policy_rejected": rejected}
    return plain | sums | {"reference_chosen": 0.0, "reference_rejected": 0.0} | {
        "n_chosen": n, "n_rejected": n,
    }  # fmt: skip


FAR = (
    *[(-1e-9, -1e-9), (1e4, -1.0), (-1e4, -1.0), (-1.0, 1e4), (-1.0, -1e4)],
    *[(5e3, -5e3), (-5e3, 5e3), (740.0, -1.0), (-740.0, -1.0), (30.0, -30.0)],
)
OVERFLOWS = {"fdpo_forward_kl": 700.0, "fdpo_alpha": 1400.0, "alphapo": 2800.0, "fdpo_js": 1e4}
"""Minus the log-ratio (or mean log-prob) where exp would overflow at the default alpha."""
ONLY_NEGATIVE = ("orpo",)


def extremes(name: str) -> list[Numbers]:
    """At least 20 pairs far from rest, inside the loss's domain."""
    pairs = [moved(c, r, n) for c, r in FAR for n in (1.0, 400.0)]
    if name in ONLY_NEGATIVE:
        pairs = [
            pair | {f"policy_{side}": -abs(pair[f"policy_{side}"]) for side in SIDES}
            for pair in pairs
        ]
    if name in OVERFLOWS:
        least = OVERFLOWS[name]
        pairs = [
            pair | {f"policy_{side}": max(pair[f"policy_{side}"], -least) for side in SIDES}
            for pair in pairs
        ]
    return pairs


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 10.0])
def test_far_from_rest_nothing_overflows_and_tails_keep_their_precision(
    name: str, beta: float
) -> None:
    spec = REGISTRY[name]
    values = {**spec.defaults, **({"beta": beta} if "beta" in spec.parameters else {})}
    pairs = extremes(name)
    assert len(pairs) == 20
    # exp(700) beside exp(-700), for the losses that take exp of log-ratios.
    check(name, pairs, values, STATISTICS, 400 if name in OVERFLOWS else DIGITS)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outside_its_domain_a_loss_is_a_number_or_says_why(name: str, dtype: torch.dtype) -> None:
    spec = REGISTRY[name]
    far = [moved(c, r, n) for c, r in (*FAR, (-1e5, -1e5), (0.0, 0.0)) for n in (1.0, 400.0)]
    batch = batch_of([pair | {"strength": 0.0} for pair in far], dtype)
    if name in ("orpo", "odpo"):
        with pytest.raises(LossInputError, match=r"must be (below|above) 0"):
            spec.loss(batch, spec.defaults, STATISTICS)
        return
    results = [
        spec.loss(batch, spec.defaults, STATISTICS),
        spec.gradient_weight(batch, spec.defaults, STATISTICS),
        *spec.scores(batch, spec.defaults),
    ]
    slopes = gradients(spec, batch, spec.defaults, STATISTICS)
    results += [torch.tensor(side, dtype=torch.float64) for side in slopes]
    for result in results:
        assert not result.isnan().any()
        assert result.isfinite().all() or name == "discopop", "exp(-m) is what its formula says"


def test_in_float32_a_lost_pair_still_has_a_gradient() -> None:
    spec = REGISTRY["kto"]
    pair = moved(-250.0, 0.0, 1.0)
    expected = slope(FORMULAS["kto"], {**pair, **spec.defaults, "kl": 0.0}, "policy_chosen")
    found = gradients(spec, batch_of([pair], torch.float32), spec.defaults, {"kl": 0.0})[0][0]
    assert found == pytest.approx(expected, rel=1e-5)
    x = torch.tensor(25.0, requires_grad=True)
    torch.autograd.backward(torch.sigmoid(x))
    assert x.grad == 0, "torch's own sigmoid must lose it, or ours is not needed"


READS = {
    "reference": ("reference_chosen", "reference_rejected"),
    "lengths": ("n_chosen", "n_rejected"),
}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_loss_reads_what_it_says_it_needs_and_nothing_else(name: str) -> None:
    """Every number of the needs moves loss or gradient, and no other number does."""
    spec = REGISTRY[name]
    pairs = [A_PAIR, {key: 1.3 * x for key, x in A_PAIR.items()}]

    def numbers(batch: PairBatch, statistics: Numbers = STATISTICS) -> list[float]:
        loss = spec.loss(batch, spec.defaults, statistics).tolist()
        if spec.statistic is not None:
            loss += spec.statistic(batch, spec.defaults, {}).values()
        return [*loss, *(x for side in spec.scores(batch, spec.defaults) for x in side.tolist())]

    plain = numbers(batch_of(pairs))
    read = {"policy_chosen", "policy_rejected", *spec.columns}
    read |= {column for need in spec.needs for column in READS.get(need, ())}
    if name == "nll_token_mean":
        read.discard("n_rejected")
    for column in A_PAIR:
        changed = numbers(batch_of([pair | {column: pair[column] * 1.07} for pair in pairs]))
        assert (changed != plain) == (column in read), column
    without_kl = {key: x for key, x in STATISTICS.items() if key != "kl"}
    if spec.needs_kl:
        with pytest.raises(KeyError, match="kl"):
            numbers(batch_of(pairs), without_kl)
    else:
        assert numbers(batch_of(pairs), without_kl) == plain
    for column in spec.columns:
        more = {k: v for k, v in batch_of(pairs).more.items() if k != column}
        with pytest.raises(LossInputError, match=column):
            numbers(replace(batch_of(pairs), more=more))


SAME = [{"lecture_kto", "apo_zero"}]  # one formula, from two places


@pytest.mark.parametrize("name", ALONE)
def test_the_check_against_the_formula_sees_a_wrong_form(name: str) -> None:
    """Swapped replies, a changed parameter, another paper's formula: each must show."""
    spec = REGISTRY[name]
    values = {key: 0.8 * value for key, value in spec.defaults.items()}
    values |= {"tau": 0.5} if "tau" in values else {}  # its own is too sharp to show here
    everything = {**{p: 0.3 for p in RANGES}, **STATISTICS, **A_PAIR}
    expected = exact(FORMULAS[name], {**everything, **values})

    def found(pair: Numbers, values: Numbers) -> float:
        return spec.loss(batch_of([pair]), values, STATISTICS).item()

    assert found(A_PAIR, values) == pytest.approx(expected, rel=1e-9)
    other_way = {f"{key.removesuffix('chosen')}rejected": key for key in A_PAIR if "chosen" in key}
    swapped = A_PAIR | {
        new: A_PAIR[old] for pair in other_way.items() for new, old in (pair, pair[::-1])
    }
    if name != "hinge" or found(A_PAIR, values) > 0:
        assert abs(found(swapped, values) / expected - 1) > 1e-3
    for key in values:
        wrong = found(A_PAIR, {**values, key: 1.1 * values[key]})
        assert abs(wrong / expected - 1) > 1e-5, key
    for other, form in FORMULAS.items():
        if {name, other} not in SAME and name != other:
            wrong = exact(form, {**everything, **values})
            assert abs(wrong / expected - 1) > 1e-5, other


@given(*[st.floats(-500, 0)] * 4, st.floats(0.01, 10))
def test_the_lectures_forms_are_the_papers_elsewhere(
    pc: float, pr: float, rc: float, rr: float, beta: float
) -> None:
    """Its IPO is the paper's at tau = beta^2 / 2, its KTO APO-zero: twice the paper's at z0 0."""
    sums = {"policy_chosen": pc, "policy_rejected": pr}
    batch = batch_of([A_PAIR | sums | {"reference_chosen": rc, "reference_rejected": rr}])

    def loss(name: str, **values: float) -> float:
        spec = REGISTRY[name]
        return spec.loss(batch, {**spec.defaults, **values}, {"kl": 0.0}).item()

    paper = beta**2 * loss("ipo", beta=beta**2 / 2)
    assert loss("lecture_ipo", beta=beta) == pytest.approx(paper, rel=1e-9, abs=1e-9)
    lecture = loss("lecture_kto", beta=beta)
    assert lecture == loss("apo_zero", beta=beta)
    assert lecture == pytest.approx(2 * loss("kto", beta=beta), rel=1e-9, abs=1e-300)


def test_targets_as_numbers_and_as_text() -> None:
    found = {
        name: str(target)
        for name, spec in REGISTRY.items()
        if (target := spec.target({**spec.defaults, "beta": 0.1})) is not None
    }
    assert found == {
        "cdpo": "21.9722 nats",
        "ipo": "5 nats",
        "ipo_mean": "5 nats per token",
        "lecture_ipo": "100 nats",
        "sppo_hard": "10 nats",
        "hinge": "10 nats",
        "exo_pair": "69.0675 nats",
        "simpo": "10 nats per token",
        "simpo_ratio": "0.5 nats per token",
        "tpo_l": "10 nats per token",
    }
    assert str(REGISTRY["simpo"].target(REGISTRY["simpo"].defaults)) == "0.5 nats per token"
    no_noise = {**REGISTRY["cdpo"].defaults, "label_smoothing": 0.0}
    assert REGISTRY["cdpo"].target(no_noise) is None


@pytest.mark.parametrize(
    "name", ["cdpo", "exo_pair", "ipo", "ipo_mean", "lecture_ipo", "sppo_hard", "hinge"]
)
@pytest.mark.parametrize("beta", [0.02, 0.1, 1.3])
def test_a_loss_that_rests_has_its_minimum_at_its_target(name: str, beta: float) -> None:
    spec = REGISTRY[name]
    values = {**spec.defaults, "beta": beta}
    target = spec.target(values)
    assert target is not None
    n = 7.0 if target.unit == "nats per token" else 1.0

    def at(margin: float) -> float:
        half = margin * n / 2  # SPPO has its target on either side
        sums = {"policy_chosen": -50 + half, "policy_rejected": -40 - half}
        references = {"reference_chosen": -50.0, "reference_rejected": -40.0}
        pair = A_PAIR | sums | references | {"n_chosen": n, "n_rejected": n}
        return spec.loss(batch_of([pair]), values, {}).item()

    rest = at(target.nats)
    assert at(target.nats * 0.99) > rest + 1e-9
    assert at(target.nats * 1.01) > rest + 1e-9 or (name == "hinge" and rest == 0)


@pytest.mark.parametrize("name", ["simpo", "simpo_ratio"])
@pytest.mark.parametrize("share", [0.0, 0.5, 3.0])
def test_simpo_is_ln_2_at_its_target(name: str, share: float) -> None:
    spec = REGISTRY[name]
    key = "gamma" if name == "simpo" else "gamma_ratio"
    values = {"beta": 2.0, key: share}
    target = spec.target(values)
    assert target is not None

    def at(chosen: float) -> float:
        pair = A_PAIR | {"policy_chosen": chosen, "policy_rejected": -24.0}
        return spec.loss(batch_of([pair]), values, {}).item()

    there = -14.0 + 7 * target.nats
    assert at(there) == pytest.approx(math.log(2), rel=1e-12)
    assert at(there + 1) < math.log(2) - 0.1, "it goes on falling"


def test_kto_clamps_a_negative_kl_at_0_and_hides_no_nan() -> None:
    spec = REGISTRY["kto"]

    def loss(kl: float) -> float:
        return spec.loss(batch_of([A_PAIR]), spec.defaults, {"kl": kl}).item()

    def weight(kl: float) -> float:
        return spec.gradient_weight(batch_of([A_PAIR]), spec.defaults, {"kl": kl}).item()

    assert loss(-3.0) == loss(0.0)
    assert weight(-3.0) == weight(0.0)
    assert abs(loss(3.0) - loss(0.0)) > 1e-4
    assert math.isnan(loss(math.nan))
    with pytest.raises(KeyError, match="kl"):
        kto_loss(batch_of([A_PAIR]), spec.defaults, {})
