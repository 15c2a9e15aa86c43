"""What training reads: pairs and labels with token ids and their reference's log-probs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from pipeline.errors import TrainingError
from pipeline.ids import content_id
from pipeline.scoring.engines.base import Completion, Group


@dataclass(frozen=True)
class Mismatched:
    """A reply to another prompt, under this one; its reference's log-prob is float64, nats."""

    completion: Completion
    reference: float


@dataclass(frozen=True)
class Example:
    """A pair or a label ready to train on; log-probs are float64, nats.

    Attributes:
        example_id: the pair's or the label's.
        prompt_ids: int32 [n].
        replies: the chosen and the rejected one, or the one with a label.
        references: the reference's log-probs of the replies; 0 for a loss that has none.
        desirable: a label's; None for a pair.
        mismatched: by optimiser step, or under None for every step; empty for a loss without a
            KL term.
        strength: how much better the chosen reply is; None for a loss that does not ask.
        weight: how much it counts beside the others of its step.
    """

    example_id: str
    prompt_ids: np.ndarray
    replies: tuple[Completion, ...]
    references: tuple[float, ...]
    desirable: bool | None = None
    mismatched: Mapping[int | None, tuple[Mismatched, ...]] = field(default_factory=dict)
    strength: float | None = None
    weight: float = 1.0

    @property
    def group(self) -> Group:
        """The prompt with its replies, as a model takes them."""
        return Group(self.prompt_ids, self.replies)

    @property
    def sides(self) -> tuple[str, ...]:
        """Which replies it has: `chosen` and `rejected`, or the one a label says."""
        if self.desirable is None:
            return ("chosen", "rejected")
        return ("chosen" if self.desirable else "rejected",)

    def mismatched_in(self, step: int | None) -> tuple[Mismatched, ...]:
        """The mismatched replies that count in an optimiser step."""
        return self.mismatched.get(step, ()) or self.mismatched.get(None, ())

    @property
    def n_tokens(self) -> int:
        """Tokens of all its sequences, the prompt counted with each (as TRL counts)."""
        return self.group.n_tokens


def training_pairs(
    pairs: pl.DataFrame,
    pair_sequences: pl.DataFrame,
    sequences: pl.DataFrame,
    reference: pl.DataFrame | None,
    kl: pl.DataFrame | None = None,
    *,
    split: str = "train",
    with_strength: bool = False,
) -> list[Example]:
    """The pairs of a split, sorted by id.

    Args:
        pairs: `schemas.PreferencePair`.
        pair_sequences: `schemas.PairSequence`, of one tokenisation.
        sequences: `schemas.Sequence` with its passes, those of mismatched replies among them.
        reference: `schemas.LogProb` of the reference, or None for a loss that has none.
        kl: `schemas.KlSequence`, for a loss with a KL term.
        split: which pairs.
        with_strength: for a loss that asks how much better the chosen reply is.

    Raises:
        TrainingError: there are none, the reference has not scored one of their sequences, or a
            strength is asked for and a pair has none.
    """
    wanted = (
        pairs.filter(pl.col("split") == split)
        .select("pair_id", "strength")
        .join(pair_sequences, on="pair_id", how="inner")
        .sort("pair_id")
    )
    if wanted.is_empty():
        left_out = pairs.filter(split="left_out").height
        said = f" ({left_out} pairs are left out of training, see their flags)" if left_out else ""
        raise TrainingError(
            f"no pair is left to train on: none of the split '{split}' was tokenised{said}"
        )
    if with_strength and (n := wanted["strength"].null_count()):
        first = wanted.filter(pl.col("strength").is_null())["pair_id"][0]
        raise TrainingError(
            f"the loss asks how strongly the chosen reply is preferred, and {n} of {wanted.height} "
            f"pairs have no strength, first {first}"
        )
    needed = [*wanted["chosen_id"], *wanted["rejected_id"]]
    read = _Read(sequences, reference, needed, kl)
    return [
        Example(
            row["pair_id"],
            read.prompt(row["chosen_id"]),
            (read.completion(row["chosen_id"]), read.completion(row["rejected_id"])),
            (read.logprob[row["chosen_id"]], read.logprob[row["rejected_id"]]),
            mismatched=read.mismatched.get(row["pair_id"], {}),
            strength=row["strength"] if with_strength else None,
        )
        for row in wanted.iter_rows(named=True)
    ]


def values_digest(examples: list[Example]) -> str:
    """An id of everything training reads: ids in order, weights, and the reference's values."""
    return content_id(
        "training values",
        [
            [
                example.example_id,
                *(reply.sequence_id for reply in example.replies),
                *example.references,
                *(
                    [step or 0, reply.completion.sequence_id, reply.reference]
                    for step, replies in example.mismatched.items()
                    for reply in replies
                ),
                *([] if example.strength is None else [example.strength]),
                *([] if example.desirable is None else [example.desirable]),
                *([] if example.weight == 1.0 else [["weight", example.weight]]),
            ]
            for example in examples
        ],
    )


class _Read:
    """Rows of the tables by id."""

    def __init__(
        self,
        sequences: pl.DataFrame,
        reference: pl.DataFrame | None,
        sequence_ids: Iterable[str],
        kl: pl.DataFrame | None,
    ) -> None:
        needed = [*sequence_ids, *(() if kl is None else kl["sequence_id"])]
        if reference is None:
            self.logprob = dict.fromkeys(needed, 0.0)
        else:
            self.logprob = dict(reference.select("sequence_id", "logprob").iter_rows())
        if missing := [i for i in needed if i not in self.logprob]:
            raise TrainingError(
                f"the reference has no log-prob of {len(missing)} sequences, first {missing[0]}"
            )
        wanted = sequences.filter(pl.col("sequence_id").is_in(set(needed)))
        self._rows = {row["sequence_id"]: row for row in wanted.iter_rows(named=True)}
        self.mismatched: dict[str, dict[int | None, tuple[Mismatched, ...]]] = {}
        for row in kl.iter_rows(named=True) if kl is not None else ():
            sequence_id = row["sequence_id"]
            reply = Mismatched(self.completion(sequence_id), self.logprob[sequence_id])
            of_example = self.mismatched.setdefault(row["pair_id"], {})
            of_example[row["step"]] = (*of_example.get(row["step"], ()), reply)

    def prompt(self, sequence_id: str) -> np.ndarray:
        return np.asarray(self._rows[sequence_id]["prompt_ids"], np.int32)

    def completion(self, sequence_id: str) -> Completion:
        row = self._rows[sequence_id]
        spans = tuple((span["start"], span["end"]) for span in row["spans"])
        ids = np.asarray(row["completion_ids"], np.int32)
        return Completion(sequence_id, ids, spans, row.get("pass_id"))
