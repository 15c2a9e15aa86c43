"""Control strings in what people said, which stay text: the template's own are told from them.

A private-use character, the guard, goes into each control string of the text before the template
renders it and is taken out afterwards; what is whole in the rendered text, the template wrote.
"""

import re
from dataclasses import dataclass

from pipeline.tokenization.errors import PairError

_GUARDS = [chr(code) for code in range(0xE000, 0xF8FF)]


@dataclass(frozen=True, slots=True)
class Marked:
    """A text, and where its control strings stand that the template wrote."""

    text: str
    controls: list[tuple[int, int]]


def guard_for(texts: list[str]) -> str:
    """A private-use character none of the texts has.

    Raises:
        PairError: `no_guard_character`.
    """
    said = "".join(texts)
    guard = next((character for character in _GUARDS if character not in said), "")
    if not guard:
        raise PairError("no_guard_character", "the text has every private-use character")
    return guard


def guarded(text: str, controls: re.Pattern[str], guard: str) -> str:
    """The text with the guard in its control strings."""
    return controls.sub(lambda found: found.group()[0] + guard + found.group()[1:], text)


def unguarded(text: str, controls: re.Pattern[str], guard: str) -> Marked:
    """A rendered text without the guard, and the control strings that had none."""
    pieces, own, length = [], [], 0
    for part in re.split(f"({controls.pattern})", text):
        if controls.fullmatch(part):
            own.append((length, length + len(part)))
        else:
            part = part.replace(guard, "")
        pieces.append(part)
        length += len(part)
    return Marked("".join(pieces), own)
