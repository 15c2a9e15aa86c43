"""Losses of examples, given their replies' log-probs, and what is logged of them."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from pipeline.errors import TrainingError
from pipeline.losses import LossSpec, PairBatch
from pipeline.plan import ObjectiveConfig
from pipeline.scoring.engines.forward.head import ENTROPY, IS_TOP1
from pipeline.training.data.examples import Example

if TYPE_CHECKING:
    import torch

Sides = Sequence[Sequence["torch.Tensor"]]
"""Log-probs of every example's replies, float64 scalars, nats."""

Numbers = dict[str, float | None]
"""An example's numbers before the update; None where it has no such number."""


def losses_of(
    spec: LossSpec,
    values: Mapping[str, float],
    statistics: Mapping[str, float],
    examples: Sequence[Example],
    sides: Sides,
) -> "list[torch.Tensor]":
    """Every example's loss, float64 scalars: a pair's, or that of a label's one row.

    Raises:
        TrainingError: there are labels and the loss is not one of rows.
    """
    pairs = [i for i, example in enumerate(examples) if example.desirable is None]
    losses: dict[int, torch.Tensor] = {}
    if pairs:
        batch = pair_batch([examples[i] for i in pairs], [sides[i] for i in pairs])
        losses |= dict(zip(pairs, spec.loss(batch, values, statistics), strict=True))
    labels = [i for i, example in enumerate(examples) if example.desirable is not None]
    if labels:
        if spec.rows is None:
            raise TrainingError(f"the loss {spec.name} is one of pairs; labels cannot train it")
        # A label stands on both sides; the side it is on counts.
        twice = [[sides[i][0]] * 2 for i in labels]
        both = pair_batch([examples[i] for i in labels], twice)
        desirable, undesirable = spec.rows(both, values, statistics)
        for i, liked, disliked in zip(labels, desirable, undesirable, strict=True):
            losses[i] = liked if examples[i].desirable else disliked
    return [losses[i] for i in range(len(examples))]


def pair_batch(examples: Sequence[Example], sides: Sides) -> PairBatch:
    """Examples as a loss reads them; a label's numbers stand on both sides."""
    import torch

    chosen, rejected = (torch.stack([of[side] for of in sides]) for side in (0, -1))
    more = {}
    if examples[0].strength is not None:
        more = {"strength": chosen.new_tensor([example.strength for example in examples])}
    return PairBatch(
        chosen,
        rejected,
        *(
            chosen.new_tensor([example.references[side] for example in examples])
            for side in (0, -1)
        ),
        *(
            chosen.new_tensor([float(len(example.replies[side].scored)) for example in examples])
            for side in (0, -1)
        ),
        more=more,
    )


def class_batch(examples: Sequence[Example], sides: Sides) -> PairBatch:
    """All preferred replies beside all others, for a statistic of the whole step.

    Pairs alone are a batch of pairs. With labels the two may be of different lengths.
    """
    if all(example.desirable is None for example in examples):
        return pair_batch(examples, sides)
    members: tuple[list[tuple[int, int]], ...] = ([], [])
    for i, example in enumerate(examples):
        if example.desirable is None:
            members[0].append((i, 0))
            members[1].append((i, 1))
        else:
            members[0 if example.desirable else 1].append((i, 0))
    like = sides[0][0]

    def columns(of: list[tuple[int, int]]) -> "list[torch.Tensor]":
        return [
            like.new_tensor([float(sides[i][side]) for i, side in of]),
            like.new_tensor([examples[i].references[side] for i, side in of]),
            like.new_tensor([float(len(examples[i].replies[side].scored)) for i, side in of]),
        ]

    return PairBatch(*chain(*zip(*(columns(of) for of in members), strict=True)))


def numbers_of(
    objective: ObjectiveConfig, example: Example, loss: float, sides: "Sequence[torch.Tensor]"
) -> Numbers:
    """What is logged of an example; its loss, and rewards as TRL logs them.

    beta x log-ratio, whatever the loss's own scale; for a loss without a reference its own score.
    """
    spec, values = objective.spec, objective.values
    beta = spec.reward_beta(values)
    logprobs = [side.item() for side in sides]
    if beta is None:
        scores = spec.scores(pair_batch([example], [sides]), values)
        rewards = [score.item() for score in scores][: len(logprobs)]
    else:
        rewards = [beta * (p - q) for p, q in zip(logprobs, example.references, strict=True)]
    numbers: Numbers = dict.fromkeys(LOGGED)
    numbers["loss"] = loss
    if example.desirable is None:
        margin = rewards[0] - rewards[1]
        numbers["rewards/margins"] = margin
        numbers["rewards/accuracies"] = 0.5 * ((margin > 0) + (margin >= 0))
    for name, reward, logprob in zip(example.sides, rewards, logprobs, strict=True):
        numbers[f"rewards/{name}"] = reward
        numbers[f"logps/{name}"] = logprob
    return numbers


LOGGED = (
    "loss",
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    *(f"logps/{name}" for name in ("chosen", "rejected")),
)
"""TRL's names of an example's numbers."""


TOKEN_STATISTICS = (ENTROPY, IS_TOP1)
"""What `forward.head` is asked for beside log-probs, where entropy and accuracy are wanted."""


def token_numbers(example: Example, extras: "Sequence[Mapping[str, torch.Tensor]]") -> Numbers:
    """An example's mean entropy, nats, and how many tokens it would have chosen itself.

    As TRL has them: the entropy is of all scored tokens, the accuracy of preferred replies alone.
    """
    if not extras[0]:
        return {"entropy": None, "mean_token_accuracy": None}
    entropy = sum(float(of_reply[ENTROPY].sum()) for of_reply in extras)
    preferred = example.desirable is not False
    return {
        "entropy": entropy / _n_scored(example),
        "mean_token_accuracy": float(extras[0][IS_TOP1].mean()) if preferred else None,
    }


def _n_scored(example: Example) -> int:
    return sum(len(reply.scored) for reply in example.replies)


def shares_of(examples: Sequence[Example]) -> list[float]:
    """What of a step's loss an example's is: by weight and rows, a pair being two. Sums to 1."""
    weights = [example.weight * len(example.replies) for example in examples]
    total = sum(weights)
    return [weight / total for weight in weights]


def means_of(seen: Sequence[Numbers], examples: Sequence[Example]) -> Numbers:
    """The step's numbers: the loss by share, the others plainly over those that have one.

    Entropy and token accuracy are means over tokens.
    """
    shares = shares_of(examples)
    total = sum(shares)
    loss = sum(s * (n["loss"] or 0.0) for s, n in zip(shares, seen, strict=True)) / total
    means: Numbers = {"loss": loss}
    for name in LOGGED[1:]:
        there = [value for numbers in seen if (value := numbers[name]) is not None]
        means[name] = sum(there) / len(there) if there else None
    counts = {
        "entropy": [_n_scored(example) for example in examples],
        "mean_token_accuracy": [len(example.replies[0].scored) for example in examples],
    }
    for name, of_example in counts.items():
        told = [
            (value, n)
            for numbers, n in zip(seen, of_example, strict=True)
            if (value := numbers[name]) is not None
        ]
        n_tokens = sum(n for _, n in told)
        means[name] = sum(value * n for value, n in told) / n_tokens if told else None
    return means
