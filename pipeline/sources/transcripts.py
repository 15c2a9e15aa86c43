r"""Conversations written into one string: HH's "\n\nHuman:" and HelpSteer's "<extra_id_1>User"."""

import re

from pipeline.sources.base import Message, RowError

_HH = re.compile(r"\n\n(Human|Assistant):")
_STEER = re.compile(r"(?:^|\n)<extra_id_[01]>(System|User|Assistant)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}


def is_transcript(value: object) -> bool:
    """Whether it is a text that begins as HH's transcripts do."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def hh_turns(text: str, place: str) -> list[Message]:
    """The turns of an HH transcript, each stripped of the white space round it.

    Raises:
        RowError: `not_a_transcript`.
    """
    head, *parts = _HH.split(text)
    if head.strip() or not parts:
        raise RowError("not_a_transcript", f"'{place}' does not begin with a turn")
    return [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def steer_turns(text: str) -> list[Message]:
    """The turns of a HelpSteer prompt; what stands before the first marker is the user's.

    An unfinished turn of the assistant at the end, which asks for the reply, is left out.
    """
    if "<extra_id_" not in text:
        return [{"role": "user", "content": text}]
    head, *parts = _STEER.split(text if text.endswith("\n") else text + "\n")
    messages: list[Message] = [{"role": "user", "content": head.removesuffix("\n")}] if head else []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": _ROLES[speaker], "content": content.removesuffix("\n")})
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()
    return messages
