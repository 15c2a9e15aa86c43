"""Pairs for the tests of losses: their numbers by name, and as the batch a loss reads."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from pipeline.losses import NEEDS, LossSpec, PairBatch

Numbers = dict[str, float]
"""A pair's fields and columns, its loss's values and statistics, by name."""

SIDES = ("chosen", "rejected")
SUMS = [field.name for field in fields(PairBatch) if field.name != "more"]
STATISTICS = {"kl": 1.5, "shift": 0.4, "surplus": 2.5, "tokens": 11.0}
A_PAIR: Numbers = {
    **{"policy_chosen": -20.0, "policy_rejected": -20.3, "n_chosen": 7.0},
    **{"reference_chosen": -18.0, "reference_rejected": -29.5, "n_rejected": 12.0},
    **{"policy_prefix_chosen": -15.0, "policy_prefix_rejected": -16.0, "strength": 2.5},
    **{"reference_prefix_chosen": -14.5, "reference_prefix_rejected": -16.5, "n_gold": 5.0},
    **{"alignment_chosen": -0.5, "alignment_rejected": -0.8, "gold_logprob": -9.0},
    **{"sequential_kl_chosen": 1.0, "sequential_kl_rejected": 4.0},
}


def a_pair(generator: np.random.Generator, largest: float = 500.0) -> Numbers:
    """Log-probs down to -`largest`, 1 to 400 tokens, and every column a loss may ask for."""

    def logprob() -> float:
        return float(-generator.uniform(1e-3, largest))

    pair = {name: logprob() for name in SUMS}
    pair |= {f"n_{side}": float(generator.integers(1, 400)) for side in SIDES}
    for model in ("policy", "reference"):
        for side in SIDES:
            pair[f"{model}_prefix_{side}"] = pair[f"{model}_{side}"] * generator.uniform()
    pair |= {f"alignment_{side}": generator.uniform(-5, 1) for side in SIDES}
    pair |= {f"sequential_kl_{side}": generator.uniform(0, 50) for side in SIDES}
    pair |= {"strength": generator.uniform(0.05, 6), "gold_logprob": logprob(), "n_gold": 7.0}
    return pair


def batch_of(pairs: Sequence[Mapping[str, float]], dtype: torch.dtype = torch.float64) -> PairBatch:
    def column(name: str) -> torch.Tensor:
        return torch.tensor([pair[name] for pair in pairs], dtype=dtype)

    more = [name for need in NEEDS.values() for name in need.columns]
    return PairBatch(*map(column, SUMS), more={name: column(name) for name in more})


def gradients(spec: LossSpec, batch: PairBatch, values: Any, statistics: Any) -> list[list[float]]:
    """Autograd's dLoss/d policy log-prob, chosen and rejected."""
    sides = [batch.policy_chosen.requires_grad_(), batch.policy_rejected.requires_grad_()]
    total = spec.loss(batch, values, statistics).sum()
    found = torch.autograd.grad(total, sides, allow_unused=True, materialize_grads=True)
    return [side.tolist() for side in found]
