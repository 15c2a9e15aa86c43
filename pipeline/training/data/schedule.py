"""Which examples every optimiser step takes, in order."""

from collections.abc import Mapping
from functools import partial

from pipeline.ids import unit_interval
from pipeline.plan import TrainingConfig


def step_ids(n_tokens: Mapping[str, int], config: TrainingConfig) -> list[list[str]]:
    """The examples of every optimiser step, in order.

    Each epoch visits every example once, in an order that depends on the seed, the epoch and the
    examples' ids alone. A batch never spans two epochs; an epoch's last may be smaller.

    Args:
        n_tokens: every example's tokens, by id; read only where a batch is counted in tokens.
        config: `batch_pairs` or `batch_tokens`, `epochs`, `max_steps` and `seed`.
    """
    steps: list[list[str]] = []
    left = config.epochs
    epoch = 0
    while left > 0 and (config.max_steps is None or len(steps) < config.max_steps):
        salt = f"order {config.seed} {epoch}"
        whole = _cut(sorted(n_tokens, key=partial(unit_interval, salt=salt)), n_tokens, config)
        # A share of an epoch is a share of its steps; training is one step at least.
        n = len(whole) if left >= 1 else round(left * len(whole))
        steps += whole[: n or int(not steps)]
        epoch, left = epoch + 1, left - 1
    return steps[: config.max_steps]


def _cut(order: list[str], n_tokens: Mapping[str, int], config: TrainingConfig) -> list[list[str]]:
    if config.batch_tokens is None:
        size = config.batch_pairs
        return [order[i : i + size] for i in range(0, len(order), size)]
    batches: list[list[str]] = []
    room = 0
    for example in order:
        if not batches or n_tokens[example] > room:
            batches.append([])
            room = config.batch_tokens
        batches[-1].append(example)
        room -= n_tokens[example]
    return batches
