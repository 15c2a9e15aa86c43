"""What training reads: pairs with their token ids and their reference's log-probs."""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.errors import TrainingError
from pipeline.ids import content_id, unit_interval
from pipeline.plan import TrainingConfig
from pipeline.scoring.engine import Completion


@dataclass(frozen=True)
class TrainingPair:
    """A pair ready to train on; log-probs are float64, nats."""

    pair_id: str
    prompt_ids: np.ndarray
    chosen: Completion
    rejected: Completion
    reference_chosen: float
    reference_rejected: float

    @property
    def n_tokens(self) -> int:
        """Tokens of both sequences, the prompt counted twice (as TRL counts)."""
        return 2 * len(self.prompt_ids) + len(self.chosen.ids) + len(self.rejected.ids)


def training_pairs(
    pairs: pl.DataFrame,
    pair_sequences: pl.DataFrame,
    sequences: pl.DataFrame,
    reference: pl.DataFrame,
) -> list[TrainingPair]:
    """The pairs of the `train` split, sorted by id.

    Raises:
        TrainingError: there are none, or the reference has not scored one of their sequences.
    """
    wanted = (
        pairs.filter(pl.col("split") == "train")
        .select("pair_id")
        .join(pair_sequences, on="pair_id", how="inner")
        .sort("pair_id")
    )
    if wanted.is_empty():
        raise TrainingError("no pair is left to train on: none of the split 'train' was tokenised")
    by_id = {row["sequence_id"]: row for row in sequences.iter_rows(named=True)}
    logprob = dict(reference.select("sequence_id", "logprob").iter_rows())
    needed = [*wanted["chosen_id"], *wanted["rejected_id"]]
    if missing := [i for i in needed if i not in logprob]:
        raise TrainingError(
            f"the reference has no log-prob of {len(missing)} sequences, first {missing[0]}"
        )
    return [
        TrainingPair(
            row["pair_id"],
            np.asarray(by_id[row["chosen_id"]]["prompt_ids"], np.int32),
            _completion(by_id[row["chosen_id"]]),
            _completion(by_id[row["rejected_id"]]),
            logprob[row["chosen_id"]],
            logprob[row["rejected_id"]],
        )
        for row in wanted.iter_rows(named=True)
    ]


def values_digest(pairs: list[TrainingPair]) -> str:
    """An id of everything training reads: ids in order, and the reference's values."""
    return content_id(
        "training values",
        [
            [
                pair.pair_id,
                *(pair.chosen.sequence_id, pair.rejected.sequence_id),
                *(pair.reference_chosen, pair.reference_rejected),
            ]
            for pair in pairs
        ],
    )


def steps_per_epoch(pairs: list[TrainingPair], config: TrainingConfig) -> int:
    """Optimiser steps that visit every pair once; the last may be a smaller batch."""
    return math.ceil(len(pairs) / config.batch_pairs)


def schedule_of(pairs: list[TrainingPair], config: TrainingConfig) -> list[list[TrainingPair]]:
    """The batch of every optimiser step, in order.

    Each epoch visits every pair once, in an order that depends on the seed, the epoch and the
    pairs' ids alone. A batch never spans two epochs.
    """
    n_steps = max(1, round(config.epochs * steps_per_epoch(pairs, config)))
    if config.max_steps is not None:
        n_steps = min(n_steps, config.max_steps)
    steps: list[list[TrainingPair]] = []
    epoch = 0
    while len(steps) < n_steps:
        salt = f"order {config.seed} {epoch}"
        order = sorted(pairs, key=lambda pair: unit_interval(pair.pair_id, salt))
        size = config.batch_pairs
        steps += [order[i : i + size] for i in range(0, len(order), size)]
        epoch += 1
    return steps[:n_steps]


def _completion(row: dict[str, object]) -> Completion:
    spans = tuple((span["start"], span["end"]) for span in row["spans"])  # type: ignore[attr-defined]
    return Completion(str(row["sequence_id"]), np.asarray(row["completion_ids"], np.int32), spans)
