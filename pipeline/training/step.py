"""One optimiser step's losses and gradients, a pair in memory at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import TrainingError
from pipeline.losses import PairBatch
from pipeline.plan import ObjectiveConfig
from pipeline.scoring.engines.base import Completion, Group, sequence_sum
from pipeline.scoring.engines.forward import Forward
from pipeline.training.batches import Mismatched, TrainingPair

if TYPE_CHECKING:
    import torch

Report = Callable[[int, int], None]
"""Takes pairs and tokens done."""


@dataclass(frozen=True)
class Row:
    """A pair's loss and dLoss/d log-prob of its two replies, in a loss of the whole step."""

    loss: float
    chosen: float
    rejected: float


@dataclass(frozen=True)
class Ahead:
    """What is known of a step before its pairs are gone through one by one.

    Attributes:
        statistics: what the loss must know of the whole step.
        rows: one per pair where a pair's loss depends on the others, else empty.
    """

    statistics: Mapping[str, float]
    rows: list[Row]


def look_ahead(
    forward: Forward,
    batch: list[TrainingPair],
    step: int,
    objective: ObjectiveConfig,
    before: Mapping[str, float],
    report: Report,
) -> Ahead:
    """What the loss must know of the whole step, before its update and without a gradient.

    Over the step, so that it does not depend on how the step is cut into passes. `kl`: the mean
    log-ratio of the step's mismatched replies, nats, at least 0 (arXiv 2402.01306, section 4.1).
    A loss whose pairs depend on one another is computed here, of log-probs without a gradient,
    and its slopes are kept: the pass that follows hands them on to the weights.

    Args:
        forward: the policy's forward pass.
        batch: the step's pairs.
        step: its number.
        objective: the loss and its values.
        before: the statistics of the step before, for a running mean.
        report: told of every pass.

    Raises:
        TrainingError: the loss needs mismatched replies and the step has none.
    """
    import torch

    spec, values = objective.spec, objective.values
    statistics: dict[str, float] = {}
    if spec.needs_kl:
        statistics["kl"] = _kl(forward, batch, step, objective, report)
    if not spec.needs_batch:
        return Ahead(statistics, [])
    singles = []
    with torch.no_grad():
        for pair in batch:
            sides = sequence_logprobs(forward, pair.prompt_ids, [pair.chosen, pair.rejected])
            singles.append(_pair_batch(pair, sides))
            report(0, pair.n_tokens)
    whole = _joined(singles)
    if spec.statistic is not None:
        statistics |= spec.statistic(whole, values, before)
    leaves = (whole.policy_chosen.requires_grad_(), whole.policy_rejected.requires_grad_())
    losses = spec.loss(whole, values, statistics)
    slopes = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    rows = zip(losses.tolist(), *(slope.tolist() for slope in slopes), strict=True)
    return Ahead(statistics, [Row(*row) for row in rows])


def backward(
    forward: Forward,
    pair: TrainingPair,
    objective: ObjectiveConfig,
    statistics: Mapping[str, float],
    n_pairs: int,
    row: Row | None = None,
) -> dict[str, float]:
    """Add one pair's share of the step's gradient; returns its numbers before the update.

    Args:
        forward: the policy's forward pass.
        pair: the pair.
        objective: the loss and its values.
        statistics: what the loss knows of the whole step.
        n_pairs: the step's pairs, whose losses' mean is the step's.
        row: the pair's loss and slopes, where `look_ahead` has them.
    """
    import torch

    spec, values = objective.spec, objective.values
    sides = sequence_logprobs(forward, pair.prompt_ids, [pair.chosen, pair.rejected])
    batch = _pair_batch(pair, sides)
    if row is None:
        of_pair = spec.loss(batch, values, statistics)[0]
        torch.autograd.backward(of_pair / n_pairs)
        loss = of_pair.item()
    else:
        # Its gradient is the slopes'; its value means nothing.
        torch.autograd.backward((row.chosen * sides[0] + row.rejected * sides[1]) / n_pairs)
        loss = row.loss
    chosen, rejected = (side.item() for side in sides)
    beta = spec.reward_beta(values)
    if beta is None:
        with torch.no_grad():
            rewards = [score.item() for score in spec.scores(batch, values)]
    else:
        # As TRL logs them: beta x log-ratio, whatever the loss's own scale.
        references = (pair.reference_chosen, pair.reference_rejected)
        rewards = [beta * (p - q) for p, q in zip((chosen, rejected), references, strict=True)]
    margin = rewards[0] - rewards[1]
    return {
        "loss": loss,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": margin,
        "rewards/accuracies": 0.5 * ((margin > 0) + (margin >= 0)),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def sequence_logprobs(
    forward: Forward, prompt_ids: np.ndarray, completions: list[Completion]
) -> "list[torch.Tensor]":
    """Log-probs of one prompt's sequences, float64 scalars of exactly the ledger's values.

    Where it matters to the bits what goes through the model together, that is what the engine puts
    together: the same shapes give the same bits at step 0.
    """
    one_pass = len({c.pass_id or c.sequence_id for c in completions}) == 1
    together = forward.sharing.exact or one_pass
    passes = [completions] if together else [[c] for c in completions]
    logprobs = [
        row for members in passes for row in forward.logprobs([Group(prompt_ids, (*members,))])[0]
    ]
    totals = []
    for row in logprobs:
        total = row.double().sum()
        exact = sequence_sum(row.detach().cpu().numpy())
        totals.append(total + (exact - total.detach()))  # torch adds in another order
    return totals


def _kl(
    forward: Forward,
    batch: list[TrainingPair],
    step: int,
    objective: ObjectiveConfig,
    report: Report,
) -> float:
    import torch

    ratios = []
    with torch.no_grad():
        for pair in batch:
            replies: tuple[Mismatched, ...] = pair.mismatched_in(step)
            completions = [reply.completion for reply in replies]
            logprobs = sequence_logprobs(forward, pair.prompt_ids, completions)
            for reply, logprob in zip(replies, logprobs, strict=True):
                ratios.append(logprob.item() - reply.reference)
                report(0, len(pair.prompt_ids) + len(reply.completion.ids))
    if not ratios:
        name = objective.spec.name
        raise TrainingError(f"step {step}: {name} needs mismatched replies, and has none")
    # In this order, so that NaN stays NaN and is refused.
    return max(math.fsum(ratios) / len(ratios), 0.0)


def _pair_batch(pair: TrainingPair, sides: "list[torch.Tensor]") -> PairBatch:
    """One pair as its loss reads it, [1] each."""
    import torch

    lengths = [float(len(completion.scored)) for completion in (pair.chosen, pair.rejected)]
    constants = torch.tensor(
        [pair.reference_chosen, pair.reference_rejected, *lengths],
        dtype=torch.float64,
        device=sides[0].device,
    ).unbind()
    more = {} if pair.strength is None else {"strength": sides[0].new_tensor([pair.strength])}
    return PairBatch(*[number[None] for number in (*sides, *constants)], more=more)


def _joined(singles: list[PairBatch]) -> PairBatch:
    import torch

    names = ("policy", "reference", "n")
    columns = [f"{name}_{side}" for name in names for side in ("chosen", "rejected")]
    return PairBatch(
        *(torch.cat([getattr(single, column) for single in singles]) for column in columns),
        more={name: torch.cat([s.more[name] for s in singles]) for name in singles[0].more},
    )
