r"""HH-RLHF transcripts (Bai et al. 2022, arXiv 2204.05862).

Fields: `chosen` and `rejected`, each a whole transcript of turns that begin with "\n\nHuman:" or
"\n\nAssistant:". Every other field survives in `meta`.
"""

import re

from pipeline.sources.base import Message, RowError, Unit, split_reply

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_hh(row: dict[str, object]) -> list[Unit]:
    """One row is one pair; a turn's text is stripped of the white space round it.

    Raises:
        RowError: `missing_field`, `wrong_type`, `not_a_transcript`, `no_reply`, `prompts_differ`.
    """
    sides = []
    for field in ("chosen", "rejected"):
        text = row.get(field)
        if text is None:
            raise RowError("missing_field", f"no '{field}'")
        if not isinstance(text, str):
            raise RowError("wrong_type", f"'{field}' is a {type(text).__name__}, not text")
        sides.append(_turns(text, field))
    prompt, chosen, rejected = split_reply(*sides)
    meta = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    return [Unit(prompt, chosen, rejected, None, meta)]


def _turns(text: str, field: str) -> list[Message]:
    head, *parts = _TURN.split(text)
    if head.strip() or not parts:
        raise RowError("not_a_transcript", f"'{field}' does not begin with a turn")
    speakers, contents = parts[::2], parts[1::2]
    return [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]
