"""A strict parse of one row: what a lenient parser would repair or hide is an error here."""

import json
import math
import re
from collections import Counter
from itertools import accumulate
from typing import NoReturn

from pipeline.sources.base import RowError

MAX_DEPTH = 100
"""Brackets within brackets. A number of our own: Python's parser follows for as long as its stack
has room, so the same row would pass or fail by where we are called from."""

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}


def parse_object(data: bytes) -> dict[str, object]:
    """Parse one JSON object.

    Raises:
        RowError: `invalid_utf8`, `invalid_json`, `not_an_object`, `duplicate_key`, `nan_literal`,
            `lone_surrogate` or `too_deep`; the detail says where.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("invalid_utf8", f"byte {error.start} of the row: {error.reason}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise RowError("too_deep", f"more than {MAX_DEPTH} brackets within one another")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except ValueError as error:
        raise RowError("invalid_json", str(error)) from None
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"the row is a {type(value).__name__}")
    if "\\u" in text:  # only an escape can bring a surrogate past the decoder
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("lone_surrogate", "an escape is half of a surrogate pair") from None
    return value


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside strings."""
    return max(accumulate(_STEP.get(c, 0) for c in _STRING.sub("", text)), default=0)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        # The detail goes into a table, and the key may hold half of a surrogate pair.
        shown = twice[:80].encode(errors="backslashreplace").decode()
        raise RowError("duplicate_key", f"key '{shown}' stands twice in one object")
    return result


def _no_constant(literal: str) -> NoReturn:
    raise RowError("nan_literal", f"{literal} is not JSON")


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise RowError("nan_literal", f"{literal[:40]} is beyond float64")
    return value
