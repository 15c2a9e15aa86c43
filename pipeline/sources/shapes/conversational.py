"""Conversational pairs: TRL's, UltraFeedback binarised, Argilla's.

Fields: `chosen` and `rejected`, lists of {role, content}; optionally `prompt`, a list that stands
before both or the text of a user turn, repeated in the lists or not; optionally `strength` and two
scores (`PAIR_SCORES`). Every other field survives in `meta`, but a `messages` equal to `chosen`.
"""

from pipeline.sources.base import Read, ReadOptions, split_reply
from pipeline.sources.fields import Leftovers, before, preference, required, turns

_FIELDS = ("prompt", "chosen", "rejected")


def read_conversational(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one pair.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `no_reply`,
            `prompts_differ`, `strength_not_finite`.
    """
    left: Leftovers = {}
    chosen = turns(required(row, "chosen"), "chosen", left)
    rejected = turns(required(row, "rejected"), "rejected", left)
    head = before(row, (chosen, rejected), left)
    said = split_reply(head + chosen, head + rejected)
    repeated = "messages" in row and row["messages"] == row["chosen"]
    return [preference(row, said, (*_FIELDS, "messages") if repeated else _FIELDS, left)]
