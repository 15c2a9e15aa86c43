"""What readers share: a row's fields by type, turns, and what is left of a row."""

import math
from collections.abc import Collection, Sequence

from pipeline.sources.base import Message, RowError, Unit, number
from pipeline.sources.transcripts import hh_turns, is_transcript

_TURN_CONTENT = frozenset(
    {"tool_calls", "tool_call_id", "function_call", "images", "videos", "audio"}
    | {"reasoning_content", "thinking"}
)
"""Turn keys that change what a model reads or says; a turn that uses one is not plain text."""

_ROW_CONTENT = frozenset(
    {"tools", "functions", "image", "images", "video", "videos", "audio", "audios"}
    | {"chat_template_kwargs"}
)
"""The same for the columns of a row."""

_NOTHING = ("[]", "{}", "null")
"""An empty value that a publisher wrote as a text."""

PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-score", "rejected-score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Names of a pair's two scores, as published; the first that is there counts, others are meta."""

_SCORE_FIELDS = frozenset(field for pair in PAIR_SCORES for field in pair)

Leftovers = dict[str, object]
"""Keys of turns that do not change the text, by the turn's place; kept in `meta`."""


def required(row: dict[str, object], field: str) -> object:
    """A field's value.

    Raises:
        RowError: `missing_field`, also for null.
    """
    value = row.get(field)
    if value is None:
        raise RowError("missing_field", f"no '{field}'")
    return value


def text(row: dict[str, object], field: str) -> str:
    """A field that must be text.

    Raises:
        RowError: `missing_field`, `wrong_type`.
    """
    value = required(row, field)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"'{field}' is a {type(value).__name__}, not text")
    return value


def optional_text(row: dict[str, object], field: str) -> str:
    """A field that is text, or absent: then the empty text.

    Raises:
        RowError: `wrong_type`.
    """
    return "" if row.get(field) is None else text(row, field)


def listed(row: dict[str, object], field: str) -> list[object]:
    """A field that must be a list.

    Raises:
        RowError: `missing_field`, `wrong_type`.
    """
    value = required(row, field)
    if not isinstance(value, list):
        raise RowError("wrong_type", f"'{field}' is a {type(value).__name__}, not a list")
    return value


def desirable(value: object, field: str) -> bool:
    """A label: true or false, or 1 or 0.

    Raises:
        RowError: `wrong_type`.
    """
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise RowError("wrong_type", f"'{field}' is neither true nor false")


def turns(
    value: object,
    place: str,
    left: Leftovers,
    role_key: str = "role",
    content_key: str = "content",
) -> list[Message]:
    """A list of turns; what else the turns hold goes into `left`.

    Raises:
        RowError: `wrong_type`, `missing_field`, `unsupported_content`.
    """
    if not isinstance(value, list):
        raise RowError("wrong_type", f"'{place}' is a {type(value).__name__}, not a list of turns")
    messages: list[Message] = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RowError(
                "wrong_type", f"{place}[{index}] is a {type(turn).__name__}, not an object"
            )
        role, content = turn.get(role_key), turn.get(content_key)
        if len(turn) > 2 or type(role) is not str or type(content) is not str:
            _look_closer(turn, f"{place}[{index}]", left, (role_key, content_key))
        messages.append({"role": role, "content": content})  # type: ignore[typeddict-item]
    return messages


def _look_closer(
    turn: dict[str, object], place: str, left: Leftovers, keys: tuple[str, str]
) -> None:
    """Of a turn that is not just a role and a text: refuse it, or keep what else it holds."""
    for key in _TURN_CONTENT & turn.keys():
        if turn[key]:
            raise RowError("unsupported_content", f"{place} has '{key}'")
    for key in keys:
        if key not in turn:
            raise RowError("missing_field", f"{place} has no '{key}'")
        if not isinstance(turn[key], str):
            rule = "unsupported_content" if isinstance(turn[key], list) else "wrong_type"
            raise RowError(rule, f"{place}.{key} is a {type(turn[key]).__name__}, not text")
    if more := {k: v for k, v in turn.items() if k not in keys and v not in (None, [], {}, "")}:
        left[place] = more


def prompt(value: object, place: str, left: Leftovers) -> list[Message]:
    """A prompt as messages: a list of turns, an HH transcript, or the text of one user turn.

    Raises:
        RowError: as `turns`; `wrong_type` for anything else.
    """
    if not isinstance(value, str):
        return turns(value, place, left)
    if not is_transcript(value):
        return [{"role": "user", "content": value}]
    messages = hh_turns(value, place)
    if messages[-1] == {"role": "assistant", "content": ""}:  # it asks for the reply
        messages.pop()
    return messages


def before(
    row: dict[str, object], sides: Sequence[list[Message]], left: Leftovers
) -> list[Message]:
    """The turns of `prompt` that stand before the conversations `sides`.

    None where these hold the prompt themselves: it is null, or a list they all begin with, or the
    text of one of their user turns, or of all of them (some publishers write the conversation so
    far into `prompt`; that text is kept in `left`).

    Raises:
        RowError: `prompts_differ` where a text is not what the conversations' user says.
    """
    value = row.get("prompt")
    if value is None:
        return []
    if isinstance(value, str) and any(turn["role"] == "user" for turn in sides[0]):
        wanted = value.strip()
        for side in sides if wanted else ():
            asked = [turn["content"].strip() for turn in side if turn["role"] == "user"]
            if wanted not in asked:
                if not all(said in wanted for said in asked):
                    raise RowError("prompts_differ", "'prompt' is no turn of the conversation")
                left["prompt"] = value
        return []
    messages = prompt(value, "prompt", left)
    if messages and all(side[: len(messages)] == messages for side in sides):
        return []
    return messages


def preference(
    row: dict[str, object],
    said: tuple[list[Message], str, str],
    used: Collection[str],
    left: Leftovers,
) -> Unit:
    """A pair of a row, with its scores and strength.

    Args:
        row: where `strength` and the scores of `PAIR_SCORES` may stand.
        said: prompt, chosen, rejected.
        used: the fields that made these.
        left: what the turns held besides.

    Raises:
        RowError: `wrong_type`, `strength_not_finite`, `unsupported_content`.
    """
    strength = number(row.get("strength"), "strength")
    scores = None
    taken = {"strength", *used}
    for better, worse in () if _SCORE_FIELDS.isdisjoint(row) else PAIR_SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            scores = (score(row, better), score(row, worse))
            strength = gap(*scores) if strength is None else strength
            taken |= {better, worse}
            break
    return Unit(*said, strength, scores, rest(row, taken, left))


def score(row: dict[str, object], field: str) -> float:
    """A field that must be a number.

    Raises:
        RowError: `missing_field`, `wrong_type`, `strength_not_finite`.
    """
    return finite(row.get(field), field)


def finite(value: object, place: str) -> float:
    """A value that must be a number.

    Raises:
        RowError: `missing_field`, `wrong_type`, `strength_not_finite`.
    """
    found = number(value, place)
    if found is None:
        raise RowError("missing_field", f"no '{place}'")
    return found


def gap(first: float, second: float) -> float:
    """The difference of two scores.

    Raises:
        RowError: `strength_not_finite`.
    """
    difference = first - second
    if not math.isfinite(difference):
        raise RowError("strength_not_finite", "the difference of the scores is beyond float64")
    return difference


def rest(row: dict[str, object], used: Collection[str], left: Leftovers) -> dict[str, object]:
    """A row's `meta`: every field that is not used, and `left` as `turn_fields`.

    Raises:
        RowError: `unsupported_content` for tools, images and the like.
    """
    meta = {key: value for key, value in row.items() if key not in used}
    for key in _ROW_CONTENT & meta.keys():
        if meta[key] and meta[key] not in _NOTHING:
            raise RowError("unsupported_content", f"the row has '{key}'")
    if left:
        meta["turn_fields"] = left
    return meta
