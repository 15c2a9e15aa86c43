"""Conversational pairs as TRL publishes them, with an explicit or an implicit prompt.

Fields: `chosen` and `rejected`, lists of {role, content}; optionally `prompt`, a list that stands
before both; optionally `strength`, a number. Every other field survives in `meta`.
"""

from pipeline.sources.base import Message, RowError, Unit, split_reply

_FIELDS = ("prompt", "chosen", "rejected", "strength")
_CONTENT_KEYS = {"tool_calls", "tool_call_id", "function_call", "images", "videos", "audio"}
"""Turn keys that change what a model reads or says; a turn that uses one is not plain text."""


def read_conversational(row: dict[str, object]) -> list[Unit]:
    """One row is one pair.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `no_reply`,
            `prompts_differ`, `strength_not_finite`.
    """
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            raise RowError("missing_field", f"no '{field}'")
    shared = _messages(row["prompt"], "prompt") if row.get("prompt") is not None else []
    prompt, chosen, rejected = split_reply(
        shared + _messages(row["chosen"], "chosen"), shared + _messages(row["rejected"], "rejected")
    )
    strength = _strength(row.get("strength"))
    meta = {key: value for key, value in row.items() if key not in _FIELDS}
    return [Unit(prompt, chosen, rejected, strength, meta)]


def _strength(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):  # a bool is an int to Python
        raise RowError("wrong_type", f"'strength' is a {type(value).__name__}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise RowError("strength_not_finite", "'strength' is beyond float64") from None


def _messages(value: object, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"'{field}' is a {type(value).__name__}, not a list of turns")
    messages: list[Message] = []
    for index, turn in enumerate(value):
        place = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise RowError("wrong_type", f"{place} is a {type(turn).__name__}, not an object")
        if used := sorted(key for key in _CONTENT_KEYS & set(turn) if turn[key]):
            raise RowError("unsupported_content", f"{place} has '{used[0]}'")
        for key in ("role", "content"):
            if key not in turn:
                raise RowError("missing_field", f"{place} has no '{key}'")
            if not isinstance(turn[key], str):
                rule = "unsupported_content" if isinstance(turn[key], list) else "wrong_type"
                raise RowError(rule, f"{place}.{key} is a {type(turn[key]).__name__}, not text")
        messages.append({"role": turn["role"], "content": turn["content"]})
    return messages
