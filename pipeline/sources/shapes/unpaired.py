"""TRL's unpaired format: one completion and whether it is desirable (KTO, arXiv 2402.01306).

Fields: `prompt` and `completion`, texts or lists of {role, content}, and `label`. A completion may
be the whole conversation. Every other field survives in `meta`.
"""

from pipeline.sources.base import Label, Read, ReadOptions, RowError
from pipeline.sources.fields import (
    Leftovers,
    before,
    desirable,
    prompt,
    required,
    rest,
    turns,
)
from pipeline.sources.transcripts import is_transcript

_FIELDS = ("prompt", "completion", "label")


def read_unpaired(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one label.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `no_reply`,
            `prompts_differ`, `not_a_transcript`.
    """
    completion, label = required(row, "completion"), required(row, "label")
    left: Leftovers = {}
    if isinstance(completion, str):
        asked = prompt(required(row, "prompt"), "prompt", left)
        reply = completion.strip() if is_transcript(row["prompt"]) else completion
    else:
        said = turns(completion, "completion", left)
        said = before(row, (said,), left) + said
        if not said or said[-1]["role"] != "assistant":
            raise RowError("no_reply", "completion does not end with an assistant turn")
        asked, reply = said[:-1], said[-1]["content"]
    return [Label(asked, reply, desirable(label, "label"), rest(row, _FIELDS, left))]
