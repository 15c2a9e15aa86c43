"""DPO's theory on policies small enough to write down: every reply of a prompt is in the table.

A policy is a tensor of log-probs [prompts, replies], float64, nats; each row's probabilities sum
to 1. Rewards have the same shape. Section numbers are the lecture's; `docs/theory.md` walks
through it with these functions, and the tests hold every step of it.
"""

from typing import TYPE_CHECKING

from pipeline.losses import LossSpec, PairBatch, Values

if TYPE_CHECKING:
    import torch


def kl_objective(
    policy: "torch.Tensor", reference: "torch.Tensor", rewards: "torch.Tensor", beta: float
) -> "torch.Tensor":
    """E[r] - beta * KL(policy || reference), [prompts] (section 1.1; DPO paper, eq. 3)."""
    return (policy.exp() * (rewards - beta * (policy - reference))).sum(-1)


def log_partition(
    reference: "torch.Tensor", rewards: "torch.Tensor", beta: float
) -> "torch.Tensor":
    """Log Z(x), Z the sum of reference * exp(r / beta), [prompts] (section 2.3)."""
    return (reference + rewards / beta).logsumexp(-1)


def optimal_policy(
    reference: "torch.Tensor", rewards: "torch.Tensor", beta: float
) -> "torch.Tensor":
    """Log-probs of reference * exp(r / beta) / Z, [prompts, replies] (section 2.3; eq. 4).

    The one policy that maximises `kl_objective`, where it is beta * log Z.
    """
    return reference + rewards / beta - log_partition(reference, rewards, beta)[..., None]


def implicit_rewards(
    policy: "torch.Tensor", reference: "torch.Tensor", beta: float
) -> "torch.Tensor":
    """Beta * log(policy / reference), [prompts, replies] (section 5.3).

    Of the optimal policy they are the rewards less beta * log Z(x), the same for all replies.
    """
    return beta * (policy - reference)


def preferences(rewards: "torch.Tensor") -> "torch.Tensor":
    """Bradley-Terry: how likely reply i is preferred to j, [prompts, i, j] (section 1.2)."""
    from pipeline.losses.stable import sigmoid

    return sigmoid(rewards[..., :, None] - rewards[..., None, :])


def all_pairs(policy: "torch.Tensor", reference: "torch.Tensor") -> PairBatch:
    """Every ordered pair of two replies of a prompt, the first as chosen, as losses read it.

    [prompts * replies * (replies - 1)], prompt by prompt, row by row; every reply one token long.
    """
    import torch

    n = policy.shape[-1]
    i, j = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    chosen, rejected = policy[:, i].flatten(), policy[:, j].flatten()
    one = torch.ones_like(chosen)
    return PairBatch(
        chosen, rejected, reference[:, i].flatten(), reference[:, j].flatten(), one, one
    )


def exact_loss(
    spec: LossSpec,
    values: Values,
    policy: "torch.Tensor",
    reference: "torch.Tensor",
    wins: "torch.Tensor",
) -> "torch.Tensor":
    """A loss's expectation, a scalar: all pairs of replies equally often, labelled as they win.

    Args:
        spec: a loss of its own pair.
        values: its parameters.
        policy: log-probs [prompts, replies].
        reference: the same.
        wins: how likely i is labelled better than j, [prompts, i, j], as of `preferences`.
    """
    import torch

    n = policy.shape[-1]
    i, j = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    losses = spec.loss(all_pairs(policy, reference), values, {})
    pairs_per_prompt = n * (n - 1) / 2
    return (wins[:, i, j].flatten() * losses).sum() / (pairs_per_prompt * len(policy))


def minimise(
    spec: LossSpec,
    values: Values,
    reference: "torch.Tensor",
    wins: "torch.Tensor",
    steps: int = 200,
) -> "torch.Tensor":
    """The policy where `exact_loss` is least, log-probs [prompts, replies], by L-BFGS on logits.

    A loss whose least value lies at infinity gives what `steps` iterations reach.
    """
    import torch

    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=steps,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> "torch.Tensor":
        optimiser.zero_grad()
        loss = exact_loss(spec, values, logits.log_softmax(-1), reference, wins)
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return logits.detach().log_softmax(-1)
