"""Candidates of a row that lists several."""

from collections.abc import Callable, Sequence

from pipeline.sources.base import Candidate, Message, RowError
from pipeline.sources.fields import Leftovers, turns

TEXTS = ("text", "response", "completion", "answer", "content", "output")
"""What publishers call a candidate's text."""

Reader = Callable[[int], tuple[object, float, dict[str, object]]]
"""A candidate's index to its reply, its score and its meta."""


def candidates(
    prompt: list[Message], place: str, count: int, read: Reader, *, strip: bool = False
) -> tuple[list[Candidate], list[RowError]]:
    """The candidates that can be read, and why the others cannot.

    Args:
        prompt: of all of them.
        place: the name of their list, for the errors.
        count: how many there are.
        read: raises `RowError` for a candidate that cannot be read.
        strip: whether to take off the white space round a reply.
    """
    good: list[Candidate] = []
    bad: list[RowError] = []
    for index in range(count):
        try:
            said, score, meta = read(index)
            text, left = reply(said, f"{place}[{index}]")
        except RowError as error:
            bad.append(error)
            continue
        if left:
            meta["turn_fields"] = left
        good.append(Candidate(prompt, text.strip() if strip else text, score, meta))
    return good, bad


def reply(value: object, place: str) -> tuple[str, Leftovers]:
    """A candidate's text, given as text or as a list of one assistant turn.

    Raises:
        RowError: `wrong_type`, `missing_field`, `unsupported_content`, `no_reply`.
    """
    if isinstance(value, str):
        return value, {}
    left: Leftovers = {}
    said = turns(value, place, left)
    if not said or said[-1]["role"] != "assistant":
        raise RowError("no_reply", f"{place} does not end with an assistant turn")
    if len(said) > 1:
        raise RowError("unsupported_content", f"{place} has {len(said)} turns, not one reply")
    return said[0]["content"], left


def item(items: Sequence[object], index: int, place: str) -> dict[str, object]:
    """One entry of a list of objects.

    Raises:
        RowError: `wrong_type`.
    """
    value = items[index]
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise RowError("wrong_type", f"{place}[{index}] is a {kind}, not an object")
    return value


def text_field(entry: dict[str, object], place: str) -> str:
    """Which of `TEXTS` an entry has.

    Raises:
        RowError: `missing_field`.
    """
    for field in TEXTS:
        if entry.get(field) is not None:
            return field
    raise RowError("missing_field", f"{place} has none of {', '.join(TEXTS)}")


def first_list(row: dict[str, object], names: Sequence[str]) -> tuple[str, list[object]]:
    """The first of the named fields that is there, which must be a list.

    Raises:
        RowError: `missing_field`, `wrong_type`.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            return name, value
        if value is not None:
            raise RowError("wrong_type", f"'{name}' is a {type(value).__name__}, not a list")
    raise RowError("missing_field", f"none of {', '.join(names)}")


def parallel(row: dict[str, object], field: str, like: str, count: int) -> list[object]:
    """A list with as many entries as the one it belongs to.

    Raises:
        RowError: `missing_field`, `wrong_type`, `lengths_differ`.
    """
    name, values = first_list(row, (field,))
    if len(values) != count:
        detail = f"'{name}' has {len(values)} entries, '{like}' {count}"
        raise RowError("lengths_differ", detail)
    return values
