r"""Pairs of plain texts, as TRL's standard format has them.

Fields: `chosen`, `rejected` and optionally `prompt`, all texts. A prompt is one user turn; one that
begins with "\n\nHuman:" is an HH transcript. Without it, the prompt is what both texts begin with.
"""

from pipeline.sources.base import Message, Read, ReadOptions, RowError
from pipeline.sources.fields import Leftovers, preference, prompt, text
from pipeline.sources.shapes.hh import read_hh
from pipeline.sources.transcripts import is_transcript

_FIELDS = ("prompt", "chosen", "rejected")


def read_standard(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one pair.

    Raises:
        RowError: `missing_field`, `wrong_type`, `prompts_differ` where the two texts have no
            beginning in common, `strength_not_finite`, and those of a transcript.
    """
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    given = row.get("prompt")
    left: Leftovers = {}
    if given is None:
        if is_transcript(chosen) and is_transcript(rejected):
            return read_hh(row, options)
        said = _split(chosen, rejected)
    elif is_transcript(given):
        said = (prompt(given, "prompt", left), chosen.strip(), rejected.strip())
    else:
        said = (prompt(given, "prompt", left), chosen, rejected)
    return [preference(row, said, _FIELDS, left)]


def _split(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    """Cut both texts where the last line, else the last word, ends that they have in common.

    TRL cuts at the last common character, so that replies which begin alike lose that beginning to
    the prompt. A common first line of the replies is lost here too: nothing marks where it begins.
    """
    end = _common(chosen, rejected)
    shared = chosen[:end]
    cut = shared.rfind("\n") + 1
    if not cut:
        cut = next((i for i in range(end, 0, -1) if shared[i - 1].isspace()), 0)
    if not shared[:cut].strip():
        raise RowError("prompts_differ", "no 'prompt', and the texts do not begin alike")
    asked: list[Message] = [{"role": "user", "content": shared[:cut].rstrip()}]
    return asked, chosen[cut:].lstrip(), rejected[cut:].lstrip()


def _common(a: str, b: str) -> int:
    """The length of the longest common prefix, by halving."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
