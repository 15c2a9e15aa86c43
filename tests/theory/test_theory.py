"""What the lecture proves, on policies small enough to be written down."""

import math

import pytest
import torch

from pipeline.losses import REGISTRY
from pipeline.theory import (
    all_pairs,
    exact_loss,
    implicit_rewards,
    kl_objective,
    log_partition,
    minimise,
    optimal_policy,
    preferences,
)

BETA = 0.7
DPO = REGISTRY["dpo"]


def made(seed: int, prompts: int = 3, replies: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A reference and rewards, [prompts, replies]."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2, prompts, replies, generator=generator, dtype=torch.float64)
    return (1.5 * numbers[0]).log_softmax(-1), 2 * numbers[1]


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("seed", range(5))
def test_the_closed_form_maximises_the_kl_regularised_objective(seed: int) -> None:
    """J(pi) = beta log Z - beta KL(pi || pi*): the maximum is pi*'s, and nobody else's."""
    reference, rewards = made(seed)
    best = optimal_policy(reference, rewards, BETA)
    assert torch.allclose(best.exp().sum(-1), torch.ones(3, dtype=torch.float64), rtol=1e-12)
    top = BETA * log_partition(reference, rewards, BETA)
    torch.testing.assert_close(
        kl_objective(best, reference, rewards, BETA), top, rtol=1e-12, atol=0
    )
    for other in range(20):
        policy, _ = made(100 + other)
        reached = kl_objective(policy, reference, rewards, BETA)
        torch.testing.assert_close(reached, top - BETA * kl(policy, best), rtol=1e-10, atol=1e-12)
        assert (reached < top - 1e-6).all()
    wrong_beta = optimal_policy(reference, rewards, 1.3 * BETA)
    assert (kl_objective(wrong_beta, reference, rewards, BETA) < top - 1e-6).all()


def test_the_lagrangian_is_stationary_at_the_optimum() -> None:
    """Section 2.4: r - beta log(pi / pi_ref) - beta - lambda = 0, one lambda per prompt."""
    reference, rewards = made(0)

    def spread(policy: torch.Tensor) -> float:
        probabilities = policy.exp().requires_grad_()
        objective = (probabilities * (rewards - BETA * (probabilities.log() - reference))).sum()
        (gradient,) = torch.autograd.grad(objective, probabilities)
        return float((gradient - gradient.mean(-1, keepdim=True)).abs().max())

    best = optimal_policy(reference, rewards, BETA)
    assert spread(best) < 1e-12
    assert spread(reference) > 0.1


@pytest.mark.parametrize("beta", [0.05, 0.7, 4.0])
def test_rewards_come_back_from_the_policy_up_to_log_z(beta: float) -> None:
    reference, rewards = made(1)
    best = optimal_policy(reference, rewards, beta)
    recovered = implicit_rewards(best, reference, beta)
    log_z = log_partition(reference, rewards, beta)
    torch.testing.assert_close(recovered + beta * log_z[:, None], rewards, rtol=1e-10, atol=1e-10)
    assert (recovered - rewards).abs().max() > 0.1, "Z is not nothing"
    # The registry's implicit reward is the same number.
    batch = all_pairs(best, reference)
    i, j = (~torch.eye(5, dtype=torch.bool)).nonzero(as_tuple=True)
    chosen, rejected = DPO.scores(batch, {"beta": beta})
    torch.testing.assert_close(chosen, recovered[:, i].flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rejected, recovered[:, j].flatten(), rtol=1e-12, atol=1e-12)


def test_z_cancels_in_bradley_terry() -> None:
    reference, rewards = made(2)
    best = optimal_policy(reference, rewards, BETA)
    from_policy = preferences(implicit_rewards(best, reference, BETA))
    torch.testing.assert_close(from_policy, preferences(rewards), rtol=1e-10, atol=1e-14)
    # A reward that is higher for every reply of a prompt changes Z, and nothing else.
    shifted = rewards + torch.tensor([[3.0], [-1.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(
        optimal_policy(reference, shifted, BETA), best, rtol=1e-10, atol=1e-12
    )
    z, other = (log_partition(reference, r, BETA) for r in (rewards, shifted))
    assert (z - other).abs().min() > 0.5
    # And DPO's loss is the Bradley-Terry likelihood of it.
    i, j = (~torch.eye(5, dtype=torch.bool)).nonzero(as_tuple=True)
    losses = DPO.loss(all_pairs(best, reference), {"beta": BETA}, {})
    likelihood = -preferences(rewards)[:, i, j].flatten().log()
    torch.testing.assert_close(losses, likelihood, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.7, 2.0])
def test_minimising_dpo_exactly_is_maximising_the_objective(beta: float) -> None:
    """Section 7.2: the same policy, where Bradley-Terry holds and the policy class is rich."""
    reference, rewards = made(3, prompts=2, replies=4)
    wins = preferences(rewards)
    found = minimise(DPO, {"beta": beta}, reference, wins)
    best = optimal_policy(reference, rewards, beta)
    assert kl(found, best).max() < 1e-10
    top = beta * log_partition(reference, rewards, beta)
    reached = kl_objective(found, reference, rewards, beta)
    torch.testing.assert_close(reached, top, rtol=1e-8, atol=1e-8)
    # Its least loss is the labels' own entropy.
    i, j = torch.triu_indices(4, 4, 1)
    entropy = -(wins * wins.log())[:, i, j] - (wins * wins.log())[:, j, i]
    least = exact_loss(DPO, {"beta": beta}, best, reference, wins)
    assert least.item() == pytest.approx(entropy.mean().item(), rel=1e-10)
    other = minimise(DPO, {"beta": 2 * beta}, reference, wins)
    assert kl(other, best).max() > 1e-3, "control: another beta has another optimum"


def test_the_gradient_and_its_weight_are_the_lectures() -> None:
    """Section 6.1, of logits: -beta sigmoid(r_l - r_w) (grad log pi(w) - grad log pi(l))."""
    reference, _ = made(4, prompts=1, replies=4)
    logits = made(5, prompts=1, replies=4)[0].clone().requires_grad_()
    policy = logits.log_softmax(-1)
    w, l = 2, 0  # noqa: E741
    rewards = implicit_rewards(policy, reference, BETA)
    loss = -torch.nn.functional.logsigmoid(rewards[0, w] - rewards[0, l])
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    weight = torch.sigmoid(rewards[0, l] - rewards[0, w]).item()
    ups = [torch.autograd.grad(policy[0, y], logits, retain_graph=True)[0] for y in (w, l)]
    torch.testing.assert_close(found, -BETA * weight * (ups[0] - ups[1]), rtol=1e-10, atol=1e-14)
    batch = all_pairs(policy.detach(), reference)
    i, j = (~torch.eye(4, dtype=torch.bool)).nonzero(as_tuple=True)
    row = ((i == w) & (j == l)).nonzero().item()
    weights = DPO.gradient_weight(batch, {"beta": BETA}, {})
    assert weights[int(row)].item() == pytest.approx(weight, rel=1e-12)
    # Hard examples weigh more: the lower a pair's margin, the larger its weight.
    chosen, rejected = DPO.scores(batch, {"beta": BETA})
    order = (chosen - rejected).argsort()
    assert (weights[order].diff() < 0).all()


def test_where_labels_never_vary_dpo_has_no_optimum_and_ipo_has() -> None:
    """Azar et al. 2023, section 4: DPO's margin grows for ever, IPO's stops at 1 / (2 tau)."""
    reference, _ = made(6, prompts=1, replies=2)
    always = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]], dtype=torch.float64)

    def margin(name: str, **values: float) -> float:
        spec = REGISTRY[name]
        policy = minimise(spec, {**spec.defaults, **values}, reference, always)
        return float((policy - reference)[0, 0] - (policy - reference)[0, 1])

    assert margin("ipo", beta=0.25) == pytest.approx(2.0, rel=1e-6)
    assert margin("lecture_ipo", beta=0.5) == pytest.approx(4.0, rel=1e-6)
    assert margin("dpo", beta=0.25) > 40
    assert margin("cdpo", beta=0.25, label_smoothing=0.1) == pytest.approx(
        math.log(9) / 0.25, rel=1e-6
    ), "smoothing gives it one"
