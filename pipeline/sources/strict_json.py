"""A strict parse of one row: what a lenient parser would repair or hide is an error here."""

import json
import math
from typing import NoReturn

from pipeline.sources.base import RowError


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
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise RowError("too_deep", "nested deeper than the parser follows") from None
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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError("duplicate_key", f"key '{twice[:80]}' stands twice in one object")
    return result


def _no_constant(literal: str) -> NoReturn:
    raise RowError("nan_literal", f"{literal} is not JSON")


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise RowError("nan_literal", f"{literal[:40]} is beyond float64")
    return value
