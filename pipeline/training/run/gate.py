"""The first-step gate: the trainer's own forward before any update, against the tables."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import TrainingError
from pipeline.training.data.examples import Example
from pipeline.training.run.numbers import Numbers


@dataclass(frozen=True)
class FirstStep:
    """The trainer's own forward before any update, against the tables.

    Attributes:
        n: sequences compared.
        difference: the largest difference per sequence, nats.
        tolerance: what it may be.
        accuracy: share of the first batch's pairs ranked right, ties half; exactly 0.5 when start
            and reference are one model. None where the batch has no pair.
    """

    n: int
    difference: float
    tolerance: float
    accuracy: float | None

    @property
    def passed(self) -> bool:
        """The trainer starts where the tables say."""
        return self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


def compare_first_step(
    batch: Sequence[Example],
    seen: Sequence[Numbers],
    table: Mapping[str, float],
    tolerance: float,
) -> FirstStep:
    """Compare the first batch with the start model's rows in the ledger.

    Args:
        batch: the first step's examples.
        seen: their numbers in the trainer.
        table: sequence ids to the ledger's log-probs of the start, nats.
        tolerance: the largest difference allowed, nats per sequence.

    Raises:
        TrainingError: they differ by more than the tolerance: another template, another
            reference, an adapter too many.
    """
    differences = {}
    for example, numbers in zip(batch, seen, strict=True):
        for side, reply in zip(example.sides, example.replies, strict=True):
            with suppress(KeyError):
                found = numbers[f"logps/{side}"]
                assert found is not None
                differences[reply.sequence_id] = found - table[reply.sequence_id]
    if not differences:
        raise TrainingError("step 1: the start model has no row in the ledger to be compared with")
    worst = max(differences, key=lambda i: abs(differences[i]))
    ranked = [a for numbers in seen if (a := numbers["rewards/accuracies"]) is not None]
    gate = FirstStep(
        len(differences),
        abs(differences[worst]),
        tolerance,
        sum(ranked) / len(ranked) if ranked else None,
    )
    if not gate.passed:
        mean = sum(differences.values()) / len(differences)
        raise TrainingError(
            f"step 1: before any update the trainer's log-probs differ from the start model's in "
            f"the ledger by up to {gate.difference:.3g} nats (allowed: {tolerance:.3g}; sequence "
            f"{worst}, on average {mean:+.3g} over {len(differences)}): the start, its chat "
            "template or an adapter over it is not what was scored"
        )
    return gate
