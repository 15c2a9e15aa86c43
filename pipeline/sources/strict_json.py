"""A strict parse of one row: what a lenient parser would repair or hide is an error here."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import NoReturn

from pipeline.sources.base import RowError
from pipeline.sources.files.rows import RawRow

MAX_DEPTH = 100
"""Brackets within brackets. A number of our own: Python's parser follows for as long as its stack
has room, so the same row would pass or fail by where we are called from."""

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}


def parse_row(row: RawRow) -> dict[str, object]:
    """Parse one row of a file.

    Raises:
        RowError: what `parse_object` raises, or the fault that the row was cut out with.
    """
    if row.fault is not None:
        raise RowError(*row.fault)
    return parse_object(row.data)


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
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise RowError("too_deep", f"more than {MAX_DEPTH} brackets within one another")
    try:
        value = _decode(text)
    except ValueError as error:
        raise RowError("invalid_json", str(error)) from None
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"the row is a {type(value).__name__}")
    # Only an escape can bring a surrogate past the decoder.
    if b"\\u" in data and _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("lone_surrogate", "an escape is half of a surrogate pair") from None
    return value


def _decode(text: str) -> object:
    """Parse; the quick way first, since `decode` takes half a microsecond for white space."""
    try:
        value, end = _SCAN(text, 0)
    except StopIteration:
        end = -1
    return value if end == len(text) else _DECODER.decode(text)


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


# Made once: `json.loads` with hooks makes a decoder for every row, which takes as long as parsing.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
)
_SCAN: Callable[[str, int], tuple[object, int]] = _DECODER.scan_once  # type: ignore[attr-defined]
