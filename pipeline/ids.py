"""Content ids: what a thing is, not where or when it was found."""

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

_DIGEST_BYTES = 16


def content_id(kind: str, *parts: Any) -> str:
    """BLAKE2b-128 of a canonical, length-prefixed form of `parts`, as 32 hex digits.

    `kind` separates the id spaces: a pair and a prompt of equal parts get different ids. Parts may
    be None, bool, int, float, str, bytes, one-dimensional integer arrays, and sequences and
    mappings of those (a mapping's order does not matter). `Canonical(value)` stands for `value`.

    Raises:
        TypeError: for any other type.
    """
    chunks = [_head(b"l", 1 + len(parts))]
    _add(chunks.append, kind)
    for part in parts:
        _add(chunks.append, part)
    return hashlib.blake2b(b"".join(chunks), digest_size=_DIGEST_BYTES).hexdigest()


def unit_interval(identifier: str, salt: str) -> float:
    """A number in [0, 1) that depends on the id and the salt alone, uniform over ids."""
    key = salt.encode()
    if len(key) > hashlib.blake2b.MAX_KEY_SIZE:
        key = hashlib.blake2b(key).digest()
    digest = hashlib.blake2b(identifier.encode(), key=key, digest_size=8).digest()
    # 53 bits: exactly what a float64 holds, so 1.0 cannot come out by rounding.
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


class Canonical:
    """A value's canonical form, made once: as a part it is worth what the value itself is."""

    __slots__ = ("form",)

    def __init__(self, value: Any) -> None:
        chunks: list[bytes] = []
        _add(chunks.append, value)
        self.form = b"".join(chunks)


_head = struct.Struct("<cQ").pack
"""A type's letter and a length, which go before every value."""


def _add(add: Callable[[bytes], None], value: Any) -> None:
    """Give `value`'s canonical form to `add`, piece by piece. The commonest types come first."""
    kind = type(value)
    if kind is str:
        data = value.encode()
        add(_head(b"s", len(data)))
        add(data)
    elif kind is Canonical:
        add(value.form)
    elif kind is dict:
        add(_head(b"m", len(value)))
        for key, form in _key_forms(*value):
            add(form)
            _add(add, value[key])
    elif kind is list or kind is tuple:
        add(_head(b"l", len(value)))
        for item in value:
            _add(add, item)
    elif kind is int:
        data = b"%d" % value
        add(_head(b"i", len(data)))
        add(data)
    elif kind is np.ndarray:
        _add_array(add, value)
    else:
        _add_any(add, value)


def _add_any(add: Callable[[bytes], None], value: Any) -> None:
    match value:
        case None:
            add(b"n")
        case bool():
            add(b"b1" if value else b"b0")
        case int():
            _add(add, int(value))
        case float():
            # -0.0 and 0.0 are one number, and must be one id.
            add(_head(b"f", 8) + struct.pack("<d", value + 0.0))
        case str():
            data = value.encode()
            add(_head(b"s", len(data)) + data)
        case bytes():
            add(_head(b"y", len(value)) + value)
        case np.ndarray():
            _add_array(add, value)
        case Mapping():
            _add(add, dict(value))
        case Sequence():
            _add(add, list(value))
        case _:
            raise TypeError(f"no canonical form for {type(value).__name__}")


def _add_array(add: Callable[[bytes], None], value: np.ndarray) -> None:
    if value.dtype.kind not in "iu" or value.ndim != 1:
        raise TypeError(f"no canonical form for a {value.ndim}-d array of {value.dtype}")
    data = value.astype("<i8").tobytes()
    add(_head(b"a", len(data)))
    add(data)


@lru_cache(maxsize=1024, typed=True)  # typed, since 1, 1.0 and True are equal keys
def _key_forms(*keys: Any) -> tuple[tuple[Any, bytes], ...]:
    """A mapping's keys in order, each with its canonical form."""
    return tuple((key, Canonical(key).form) for key in sorted(keys))
