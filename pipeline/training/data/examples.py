"""What training reads: pairs and labels with token ids and their reference's log-probs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from pipeline.errors import TrainingError
from pipeline.ids import content_id
from pipeline.losses import OF_ROWS
from pipeline.plan import ObjectiveConfig
from pipeline.scoring.engines.base import Completion, Group
from pipeline.training.data.preferences import Preferences


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


def training_labels(
    labels: pl.DataFrame,
    label_sequences: pl.DataFrame,
    sequences: pl.DataFrame,
    reference: pl.DataFrame | None,
    kl: pl.DataFrame | None = None,
    *,
    split: str = "train",
) -> list[Example]:
    """The labels of a split, sorted by id: examples of one reply each.

    Args:
        labels: `schemas.PreferenceLabel`.
        label_sequences: `schemas.LabelSequence`, of one tokenisation.
        sequences: `schemas.Sequence`, those of mismatched replies among them.
        reference: `schemas.LogProb` of the reference, or None for a loss that has none.
        kl: `schemas.KlSequence`, for a loss with a KL term.
        split: which labels.

    Raises:
        TrainingError: there are none, or the reference has not scored one of their sequences.
    """
    wanted = (
        labels.filter(pl.col("split") == split)
        .select("label_id", "desirable")
        .join(label_sequences, on="label_id", how="inner")
        .sort("label_id")
    )
    if wanted.is_empty():
        raise TrainingError(f"no label is left: none of the split '{split}' was tokenised")
    read = _Read(sequences, reference, wanted["sequence_id"], kl)
    return [
        Example(
            row["label_id"],
            read.prompt(row["sequence_id"]),
            (read.completion(row["sequence_id"]),),
            (read.logprob[row["sequence_id"]],),
            desirable=row["desirable"],
            mismatched=read.mismatched.get(row["label_id"], {}),
        )
        for row in wanted.iter_rows(named=True)
    ]


def training_examples(
    objective: ObjectiveConfig,
    preferences: Preferences,
    sequences: pl.DataFrame,
    reference: pl.DataFrame | None,
    kl: pl.DataFrame | None = None,
    *,
    split: str = "train",
) -> list[Example]:
    """What an objective trains or is evaluated on: its pairs by id, then its labels by id.

    Where its `data` is null, that is what there is of what its loss can read.

    Args:
        objective: its loss and `data`.
        preferences: all pairs and labels there are.
        sequences: as `training_pairs` has it.
        reference: as `training_pairs` has it.
        kl: as `training_pairs` has it.
        split: which pairs and labels.

    Raises:
        TrainingError: there is nothing, or nothing of what `data` names in the split `train`; or
            see `training_pairs`.
    """
    here = preferences.of_splits(split)
    readable = here.read_by(objective)
    tables = {"pairs": readable.pairs, "labels": readable.labels}
    wanted = [kind for kind, table in tables.items() if table.height]
    if objective.data is not None and split == "train":
        wanted = list(tables) if objective.data == "both" else [objective.data]
    if not wanted and here.labels.height and objective.spec.rows is None:
        raise TrainingError(
            f"no pair of the split '{split}' was tokenised, and {objective.spec.name} is a loss of "
            f"pairs, which the {here.labels.height} labels cannot train; these read labels: "
            f"{', '.join(OF_ROWS)}"
        )
    if not wanted:
        wanted = ["pairs" if objective.reads_pairs else "labels"]
    examples: list[Example] = []
    if "pairs" in wanted:
        examples += training_pairs(
            preferences.pairs,
            readable.pair_sequences,
            sequences,
            reference,
            kl,
            split=split,
            with_strength="strength" in objective.spec.needs,
        )
    if "labels" in wanted:
        examples += training_labels(
            preferences.labels, readable.label_sequences, sequences, reference, kl, split=split
        )
    return examples


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
            of_example = self.mismatched.setdefault(row["pair_id"] or row["label_id"], {})
            of_example[row["step"]] = (*of_example.get(row["step"], ()), reply)

    def prompt(self, sequence_id: str) -> np.ndarray:
        return np.asarray(self._rows[sequence_id]["prompt_ids"], np.int32)

    def completion(self, sequence_id: str) -> Completion:
        row = self._rows[sequence_id]
        spans = tuple((span["start"], span["end"]) for span in row["spans"])
        ids = np.asarray(row["completion_ids"], np.int32)
        return Completion(sequence_id, ids, spans, row.get("pass_id"))
