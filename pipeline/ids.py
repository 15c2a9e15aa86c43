"""Content ids: what a thing is, not where or when it was found."""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_DIGEST_BYTES = 16


def content_id(kind: str, *parts: Any) -> str:
    """BLAKE2b-128 of a canonical, length-prefixed form of `parts`, as 32 hex digits.

    `kind` separates the id spaces: a pair and a prompt of equal parts get different ids. Parts may
    be None, bool, int, float, str, bytes, one-dimensional integer arrays, and sequences and
    mappings of those (a mapping's order does not matter).

    Raises:
        TypeError: for any other type.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for chunk in _canonical([kind, *parts]):
        digest.update(chunk)
    return digest.hexdigest()


def unit_interval(identifier: str, salt: str) -> float:
    """A number in [0, 1) that depends on the id and the salt alone, uniform over ids."""
    key = salt.encode()
    if len(key) > hashlib.blake2b.MAX_KEY_SIZE:
        key = hashlib.blake2b(key).digest()
    digest = hashlib.blake2b(identifier.encode(), key=key, digest_size=8).digest()
    # 53 bits: exactly what a float64 holds, so 1.0 cannot come out by rounding.
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def _canonical(value: Any) -> Iterator[bytes]:
    match value:
        case None:
            yield b"n"
        case bool():
            yield b"b1" if value else b"b0"
        case int():
            yield _sized(b"i", str(value).encode())
        case float():
            # -0.0 and 0.0 are one number, and must be one id.
            yield _sized(b"f", struct.pack("<d", value + 0.0))
        case str():
            yield _sized(b"s", value.encode())
        case bytes():
            yield _sized(b"y", value)
        case np.ndarray():
            if value.dtype.kind not in "iu" or value.ndim != 1:
                raise TypeError(f"no canonical form for a {value.ndim}-d array of {value.dtype}")
            yield _sized(b"a", value.astype("<i8").tobytes())
        case Mapping():
            yield b"m" + struct.pack("<Q", len(value))
            for key in sorted(value):
                yield from _canonical(key)
                yield from _canonical(value[key])
        case Sequence():
            yield b"l" + struct.pack("<Q", len(value))
            for item in value:
                yield from _canonical(item)
        case _:
            raise TypeError(f"no canonical form for {type(value).__name__}")


def _sized(tag: bytes, data: bytes) -> bytes:
    return tag + struct.pack("<Q", len(data)) + data
