"""What training reads: pairs with their token ids and their reference's log-probs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import polars as pl

from pipeline.errors import TrainingError
from pipeline.ids import content_id, unit_interval
from pipeline.plan import TrainingConfig
from pipeline.scoring.engines.base import Completion


@dataclass(frozen=True)
class Mismatched:
    """A reply to another prompt, under this one; its reference's log-prob is float64, nats."""

    completion: Completion
    reference: float


@dataclass(frozen=True)
class TrainingPair:
    """A pair ready to train on; log-probs are float64, nats.

    The reference's are 0 for a loss that has none. `mismatched` is by optimiser step, or under
    None for every step; empty for a loss without a KL term. `strength` is how much better the
    chosen reply is, None for a loss that does not ask.
    """

    pair_id: str
    prompt_ids: np.ndarray
    chosen: Completion
    rejected: Completion
    reference_chosen: float
    reference_rejected: float
    mismatched: Mapping[int | None, tuple[Mismatched, ...]] = field(default_factory=dict)
    strength: float | None = None

    def mismatched_in(self, step: int) -> tuple[Mismatched, ...]:
        """The mismatched replies that count in an optimiser step."""
        return self.mismatched.get(step, ()) or self.mismatched.get(None, ())

    @property
    def n_tokens(self) -> int:
        """Tokens of both sequences, the prompt counted twice (as TRL counts)."""
        return 2 * len(self.prompt_ids) + len(self.chosen.ids) + len(self.rejected.ids)


def training_pairs(
    pairs: pl.DataFrame,
    pair_sequences: pl.DataFrame,
    sequences: pl.DataFrame,
    reference: pl.DataFrame | None,
    kl: pl.DataFrame | None = None,
    *,
    with_strength: bool = False,
) -> list[TrainingPair]:
    """The pairs of the `train` split, sorted by id.

    Args:
        pairs: `schemas.PreferencePair`.
        pair_sequences: `schemas.PairSequence`, of one tokenisation.
        sequences: `schemas.Sequence` with its passes, those of mismatched replies among them.
        reference: `schemas.LogProb` of the reference, or None for a loss that has none.
        kl: `schemas.KlSequence`, for a loss with a KL term.
        with_strength: for a loss that asks how much better the chosen reply is.

    Raises:
        TrainingError: there are none, the reference has not scored one of their sequences, or a
            strength is asked for and a pair has none.
    """
    wanted = (
        pairs.filter(pl.col("split") == "train")
        .select("pair_id", "strength")
        .join(pair_sequences, on="pair_id", how="inner")
        .sort("pair_id")
    )
    if wanted.is_empty():
        left_out = pairs.filter(split="left_out").height
        said = f" ({left_out} pairs are left out of training, see their flags)" if left_out else ""
        raise TrainingError(
            f"no pair is left to train on: none of the split 'train' was tokenised{said}"
        )
    if with_strength and (n := wanted["strength"].null_count()):
        first = wanted.filter(pl.col("strength").is_null())["pair_id"][0]
        raise TrainingError(
            f"the loss asks how strongly the chosen reply is preferred, and {n} of {wanted.height} "
            f"pairs have no strength, first {first}"
        )
    needed = [
        *wanted["chosen_id"],
        *wanted["rejected_id"],
        *(() if kl is None else kl["sequence_id"]),
    ]
    if reference is None:
        logprob = dict.fromkeys(needed, 0.0)
    else:
        logprob = dict(reference.select("sequence_id", "logprob").iter_rows())
    if missing := [i for i in needed if i not in logprob]:
        raise TrainingError(
            f"the reference has no log-prob of {len(missing)} sequences, first {missing[0]}"
        )
    by_id = {row["sequence_id"]: row for row in sequences.iter_rows(named=True)}
    mismatched: dict[str, dict[int | None, tuple[Mismatched, ...]]] = {}
    for row in kl.iter_rows(named=True) if kl is not None else ():
        reply = Mismatched(_completion(by_id[row["sequence_id"]]), logprob[row["sequence_id"]])
        of_pair = mismatched.setdefault(row["pair_id"], {})
        of_pair[row["step"]] = (*of_pair.get(row["step"], ()), reply)
    return [
        TrainingPair(
            row["pair_id"],
            np.asarray(by_id[row["chosen_id"]]["prompt_ids"], np.int32),
            _completion(by_id[row["chosen_id"]]),
            _completion(by_id[row["rejected_id"]]),
            logprob[row["chosen_id"]],
            logprob[row["rejected_id"]],
            mismatched.get(row["pair_id"], {}),
            row["strength"] if with_strength else None,
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
                *(
                    [step or 0, reply.completion.sequence_id, reply.reference]
                    for step, replies in pair.mismatched.items()
                    for reply in replies
                ),
                *([] if pair.strength is None else [pair.strength]),
            ]
            for pair in pairs
        ],
    )


def steps_per_epoch(n_pairs: int, config: TrainingConfig) -> int:
    """Optimiser steps that visit every pair once; the last may be a smaller batch."""
    return math.ceil(n_pairs / config.batch_pairs)


def step_ids(pair_ids: list[str], config: TrainingConfig) -> list[list[str]]:
    """The pairs of every optimiser step, in order.

    Each epoch visits every pair once, in an order that depends on the seed, the epoch and the
    pairs' ids alone. A batch never spans two epochs.
    """
    n_steps = max(1, round(config.epochs * steps_per_epoch(len(pair_ids), config)))
    if config.max_steps is not None:
        n_steps = min(n_steps, config.max_steps)
    steps: list[list[str]] = []
    epoch = 0
    while len(steps) < n_steps:
        salt = f"order {config.seed} {epoch}"
        order = sorted(pair_ids, key=partial(unit_interval, salt=salt))
        size = config.batch_pairs
        steps += [order[i : i + size] for i in range(0, len(order), size)]
        epoch += 1
    return steps[:n_steps]


def schedule_of(pairs: list[TrainingPair], config: TrainingConfig) -> list[list[TrainingPair]]:
    """The batch of every optimiser step, in order (`step_ids`)."""
    by_id = {pair.pair_id: pair for pair in pairs}
    return [[by_id[i] for i in batch] for batch in step_ids(list(by_id), config)]


def _completion(row: dict[str, object]) -> Completion:
    spans = tuple((span["start"], span["end"]) for span in row["spans"])  # type: ignore[attr-defined]
    ids = np.asarray(row["completion_ids"], np.int32)
    return Completion(str(row["sequence_id"]), ids, spans, row.get("pass_id"))  # type: ignore[arg-type]
