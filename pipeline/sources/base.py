"""What a reader gives back."""

import math
from dataclasses import dataclass, field
from typing import Literal, TypedDict

Pairing = Literal["best_worst", "all", "adjacent"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Unit:
    """One preference as read: the messages before the replies, and the two replies.

    `scores` are the source's for (chosen, rejected), on whatever scale; equal ones are a tie and
    a smaller first one contradicts the label, which rules decide on, not readers. `strength`, where
    the source gives none, is their difference.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    strength: float | None = None
    scores: tuple[float, float] | None = None
    meta: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Label:
    """One labelled completion (KTO-style data): whether it is desirable."""

    prompt: list[Message]
    completion: str
    desirable: bool
    meta: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One scored completion whose rivals stand in other rows of the source with the same prompt."""

    prompt: list[Message]
    completion: str
    score: float
    meta: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadOptions:
    """How a source wants its rows read; a reader ignores what does not concern its shape.

    Attributes:
        pairing: which pairs are made of a ranked list: the best and the worst, every two of
            different rank, or each with the next below it.
        min_gap: two scores less apart than this state no preference.
        score: which attribute or score field ranks the candidates; None: the shape's own.
        columns: the shape's field name to the source's column name, where they differ.
    """

    pairing: Pairing = "best_worst"
    min_gap: float = 0.0
    score: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


class RowError(Exception):
    """A row (or unit) that cannot be read; becomes a quarantine row under `rule`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail


Read = Unit | Label | Candidate | RowError
"""What one row gives, each on its own: a unit that cannot be read does not cost the others."""


def split_reply(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """Two whole conversations to (common prompt, chosen reply, rejected reply).

    The prompt is everything before the last turn; that turn must be the assistant's on both
    sides, and nothing else may differ.

    Raises:
        RowError: `no_reply` or `prompts_differ`, naming the first turn that differs.
    """
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise RowError("no_reply", f"{side} does not end with an assistant turn")
    if chosen[:-1] != rejected[:-1]:
        turns = zip(chosen[:-1], rejected[:-1], strict=False)
        shorter = min(len(chosen), len(rejected)) - 1
        first = next((i for i, (a, b) in enumerate(turns) if a != b), shorter)
        raise RowError("prompts_differ", f"the two sides differ before the reply, at turn {first}")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def number(value: object, field: str) -> float | None:
    """A number as float64, or None where there is none.

    Raises:
        RowError: `wrong_type`, `strength_not_finite`.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):  # a bool is an int to Python
        raise RowError("wrong_type", f"'{field}' is a {type(value).__name__}, not a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise RowError("strength_not_finite", f"'{field}' is beyond float64")
    return result
