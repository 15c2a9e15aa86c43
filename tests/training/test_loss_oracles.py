"""The losses against numbers of others: TRL's trainers, the lecture's example, plain float64.

`trl_trainers` says how TRL's trainers are made to run; `test_trl_losses` runs the whole family.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl_trainers import (
    BETA,
    N_POSITIONS,
    N_PROMPT,
    N_SCORED,
    Rows,
    TableModel,
    bare,
    gradient,
    make_rows,
    trl_dpo,
)

from pipeline.losses import REGISTRY, PairBatch
from pipeline.losses.dpo import dpo_loss

LOGPS = st.floats(-500, 0)


def trl_kto(rows: Rows, loss_type: str, values: Mapping[str, float]) -> torch.Tensor:
    """KTOTrainer's loss of the 8 rows, in no order, with the 8 mismatched ones."""
    from trl.trainer.kto_trainer import KTOTrainer

    model = TableModel(rows.policy, rows.squares)
    trainer = bare(
        KTOTrainer,
        model=model,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        **{"desirable_weight": 1.0, "undesirable_weight": 1.0, **values},
    )
    order = [5, 0, 3, 7, 4, 1, 2, 6]
    inputs = {
        **rows.tokens(order),
        **rows.tokens(list(range(8, 16)), "KL_"),
        "label": torch.tensor([row < 4 for row in order]),
        "ref_logps": rows.sums(rows.reference, 0, 8)[order],
        "ref_KL_logps": rows.sums(rows.reference, 8, 16),
    }
    loss: torch.Tensor = trainer._compute_loss(model, inputs, False)
    return loss


def ours(
    name: str, batch: PairBatch, values: Mapping[str, float] = BETA, kl: float = 0.0
) -> torch.Tensor:
    """A step's loss: the mean over its pairs."""
    return REGISTRY[name].loss(batch, values, {"kl": kl}).mean()


DPO_TYPES = {"dpo": "sigmoid", "ipo_mean": "ipo", "lecture_kto": "apo_zero"}


@pytest.mark.parametrize("name", DPO_TYPES)
def test_a_loss_and_its_gradient_are_trls_dpo_trainers(name: str) -> None:
    rows = make_rows()
    rows.policy.requires_grad_()
    expected, _ = trl_dpo(rows, DPO_TYPES[name])
    found = ours(name, rows.batch())
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(
        gradient(found, rows), gradient(expected, rows), rtol=1e-9, atol=1e-15
    )
    controls = {
        "beta": ours(name, rows.batch(), {"beta": 0.11}),
        "swapped reference": ours(name, rows.batch(swap_reference=True)),
        "another loss": trl_dpo(rows, "hinge")[0],
    }
    for what, control in controls.items():
        assert abs(control.item() / expected.item() - 1) > 1e-3, what


def test_trls_ipo_is_of_means_and_not_the_papers_sums() -> None:
    rows = make_rows()
    expected = trl_dpo(rows, "ipo")[0].item()
    assert abs(ours("ipo", rows.batch()).item() / expected - 1) > 0.1


def test_trl_logs_rewards_of_sums_for_ipo_too() -> None:
    """Its loss reads means, its `rewards/margins` do not: ours come from the reward table."""
    rows = make_rows()
    _, metrics = trl_dpo(rows, "ipo")
    batch = rows.batch()
    h = batch.policy_chosen - batch.reference_chosen
    h = h - (batch.policy_rejected - batch.reference_rejected)
    assert metrics["rewards/margins"] == [pytest.approx((0.1 * h).mean().item(), rel=1e-9)]


def test_trls_ipo_counts_a_first_token_it_does_not_score() -> None:
    """Without a prompt a reply's first token has no log-prob; TRL divides by it all the same.

    A length of ours is the tokens scored, and its mean is the mean.
    """
    rows = make_rows(n_prompt=0, add=1)
    expected = trl_dpo(rows, "ipo")[0].item()
    counted = rows.batch()  # lengths of whole replies
    assert ours("ipo_mean", counted).item() == pytest.approx(expected, rel=1e-9)
    n = (counted.n_chosen - 1, counted.n_rejected - 1)
    scored = replace(counted, n_chosen=n[0], n_rejected=n[1])
    assert abs(ours("ipo_mean", scored).item() / expected - 1) > 1e-2


@pytest.mark.parametrize("kl_shift", [2.0, -2.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
def test_kto_and_its_gradient_are_trls(kl_shift: float, weights: tuple[float, float]) -> None:
    rows = make_rows(kl_shift)
    values = {**BETA, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    kl = rows.kl()
    assert (kl > 1) == (kl_shift > 0), "one case for the clamp, one without"
    rows.policy.requires_grad_()
    expected = trl_kto(rows, "kto", values)
    found = ours("kto", rows.batch(), values, kl)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(
        gradient(found, rows), gradient(expected, rows), rtol=1e-9, atol=1e-15
    )
    batch = rows.batch()
    # Against z0 = kl < 0 the log-ratios are what they are against 0, less kl.
    without_clamp = replace(
        batch, policy_chosen=batch.policy_chosen - kl, policy_rejected=batch.policy_rejected - kl
    )
    controls = {
        "beta": ours("kto", batch, {**values, "beta": 0.11}, kl),
        "swapped reference": ours("kto", rows.batch(swap_reference=True), values, kl),
        "kl": ours("kto", without_clamp if kl < 0 else batch, values, 0.0),
        "sum of the two rows": 2 * found,
    }
    for what, control in controls.items():
        assert abs(control.item() / expected.item() - 1) > 1e-3, what


def test_the_lectures_kto_is_twice_trls_pooled_apo_zero() -> None:
    """KTOTrainer's `apo_zero_unpaired` is the mean over rows, the lecture adds the class means."""
    rows = make_rows()
    expected = 2 * trl_kto(rows, "apo_zero_unpaired", BETA).item()
    assert ours("lecture_kto", rows.batch()).item() == pytest.approx(expected, rel=1e-9)


@pytest.fixture
def cpo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental import cpo

    return cpo


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (10.0, 3.0), (0.1, 0.5)])
def test_simpo_is_trls_of_the_same_logits(cpo: Any, beta: float, gamma: float) -> None:
    """`CPOTrainer.get_batch_logps` and `cpo_loss`; its NLL term (`cpo_alpha`) is not SimPO's."""
    trainer = bare(
        cpo.CPOTrainer,
        loss_type="simpo",
        alpha=0.0,
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=0.0,
    )
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, N_POSITIONS, 17, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 17, (8, N_POSITIONS), generator=generator)
    n = torch.tensor(N_SCORED, dtype=torch.float64).flatten()
    labels[:, :N_PROMPT] = -100
    for row, n_scored in enumerate(n.long()):
        labels[row, N_PROMPT + n_scored :] = -100
    means = trainer.get_batch_logps(logits, labels.clone(), average_log_prob=True)
    expected, rewards, _ = trainer.cpo_loss(means[:4], means[4:])

    logprobs = logits.log_softmax(-1)
    sums = torch.stack(
        [
            logprobs[row, range(N_PROMPT - 1, stop - 1), labels[row, N_PROMPT:stop]].sum()
            for row, stop in enumerate((N_PROMPT + n.long()).tolist())
        ]
    )
    far = torch.full((4,), 1e3, dtype=torch.float64)  # a reference must not enter
    batch = PairBatch(sums[:4], sums[4:], far, -far, n[:4], n[4:])
    spec, values = REGISTRY["simpo"], {"beta": beta, "gamma": gamma}
    torch.testing.assert_close(spec.loss(batch, values, {}), expected, rtol=1e-9, atol=0)
    score = spec.scores(batch, values)[0]
    torch.testing.assert_close(score, rewards, rtol=1e-9, atol=0)

    ones = torch.ones_like(far)
    controls = {
        "sums": spec.loss(PairBatch(sums[:4], sums[4:], far, far, ones, ones), values, {}),
        "gamma as a ratio": spec.loss(batch, {**values, "gamma": gamma * beta}, {}),
        "beta": spec.loss(batch, {**values, "beta": 1.1 * beta}, {}),
    }
    for what, control in controls.items():
        assert (control / expected - 1).abs().max() > 1e-3, what


def test_trls_simpo_defaults_ask_for_5_nats_per_token(cpo: Any) -> None:
    """The paper's grid ends at 1: ours stay inside, and its other term is on unless put to 0."""
    defaults = {name: field.default for name, field in cpo.CPOConfig.__dataclass_fields__.items()}
    theirs = {"beta": defaults["beta"], "gamma": defaults["simpo_gamma"]}
    spec = REGISTRY["simpo"]
    assert str(spec.target(theirs)) == "5 nats per token"
    assert str(spec.target(spec.defaults)) == "0.5 nats per token"
    assert defaults["cpo_alpha"] == 1.0


def batch(pc: float, pr: float, rc: float, rr: float) -> PairBatch:
    pc_, pr_, rc_, rr_, n = (torch.tensor([x], dtype=torch.float64) for x in (pc, pr, rc, rr, 1.0))
    return PairBatch(pc_, pr_, rc_, rr_, n, n)


def formula(pc: float, pr: float, rc: float, rr: float, beta: float) -> float:
    m = beta * ((pc - rc) - (pr - rr))
    return max(-m, 0.0) + math.log1p(math.exp(-abs(m)))


@given(LOGPS, LOGPS, LOGPS, LOGPS, st.floats(0.01, 5))
def test_dpo_is_minus_log_sigmoid_of_the_margin(
    pc: float, pr: float, rc: float, rr: float, beta: float
) -> None:
    found = dpo_loss(batch(pc, pr, rc, rr), {"beta": beta}, {}).item()
    assert found == pytest.approx(formula(pc, pr, rc, rr, beta), rel=1e-9, abs=1e-300)


def test_the_lectures_example() -> None:
    """Section 9: three pairs, beta 0.1; margins of log-ratios are 0.6, 0.4 and 0.5 nats."""
    values = [
        [-2.5, -3.0, -2.8],  # policy, chosen
        [-3.5, -4.0, -3.8],  # policy, rejected
        [-2.8, -3.2, -3.0],  # reference, chosen
        [-3.2, -3.8, -3.5],  # reference, rejected
    ]
    pc, pr, rc, rr = (torch.tensor(x, dtype=torch.float64) for x in values)
    n = torch.ones(3, dtype=torch.float64)
    found = dpo_loss(PairBatch(pc, pr, rc, rr, n, n), BETA, {}).mean().item()
    expected = sum(math.log1p(math.exp(-0.1 * h)) for h in (0.6, 0.4, 0.5)) / 3
    assert found == pytest.approx(expected, rel=1e-12)
    control = dpo_loss(PairBatch(pc, pr, rr, rc, n, n), BETA, {}).mean()
    assert abs(control.item() - expected) > 1e-2, "a swapped reference must not give this number"


def test_policy_equal_to_reference_is_ln_2() -> None:
    found = dpo_loss(batch(-7.0, -3.0, -7.0, -3.0), {"beta": 0.3}, {}).item()
    assert found == pytest.approx(math.log(2))


@pytest.mark.parametrize("h", [-800.0, -3.0, 0.0, 2.5, 800.0])
def test_the_registered_gradient_weight_is_autograds(h: float) -> None:
    values = {"beta": 0.7}
    policy = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    torch.autograd.backward(dpo_loss(PairBatch(policy, zero, zero, zero, one, one), values, {}))
    assert policy.grad is not None
    spec = REGISTRY["dpo"]
    weight = spec.gradient_weight(PairBatch(policy, zero, zero, zero, one, one), values, {}).item()
    assert values["beta"] * weight == pytest.approx(-policy.grad.item(), rel=1e-9, abs=1e-300)
