"""What a reader gives back."""

from dataclasses import dataclass, field
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Unit:
    """One preference as read: the messages before the replies, and the two replies."""

    prompt: list[Message]
    chosen: str
    rejected: str
    strength: float | None = None
    meta: dict[str, object] = field(default_factory=dict)


class RowError(Exception):
    """A row (or unit) that cannot be read; becomes a quarantine row under `rule`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail


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
