"""Content ids: canonical, unambiguous, and the same in every process and release."""

import hashlib
import math
import os
import struct
import subprocess
import sys
from collections import OrderedDict, UserDict, UserList
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PROJECT

from pipeline.ids import Canonical, content_id, unit_interval


def test_known_digests() -> None:
    """Ids are stored in tables; a change here orphans every ledger there is."""
    assert content_id("kind") == "2adbe28d9ca95301e6b4f636e2247493"
    assert content_id("pair", "prompt", "chosen", "rejected") == "cfe051056ab8dc69f11876c1df75adbd"
    assert (
        content_id("all", None, True, -3, 0.5, "é\u2028", b"\0", [1, ["a"]], {"b": 1, "a": []})
        == "c1be0f929e732febb9aecdcd5f17b4ef"
    )
    ids = np.array([5, 0, -1], dtype=np.int32)
    assert content_id("sequence", ids, ids[:1], [(0, 1)]) == "9dad5c79395dce9af9ce23efbb381429"
    assert unit_interval("36f85ec177196ce58d071f239114217a", "logratio") == 0.4272945539034233


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (["ab", "c"], ["a", "bc"]),
        (["ab", ""], ["a", "b"]),
        (["a", "b"], ["ab"]),
        ([["a"], "b"], [["a", "b"]]),
        ([["a", "b"]], ["a", "b"]),
        ([[], []], [[[]]]),
        ([[]], [""]),
        ([None], []),
        ([None], [""]),
        ([None], [0]),
        ([1], [1.0]),
        ([1], [True]),
        ([1], ["1"]),
        ([0], [False]),
        (["a"], [b"a"]),
        ([{"a": 1}], [["a", 1]]),
        ([{"a": 1}], [[["a", 1]]]),
        ([{"a": {"b": 1}}], [{"a": {}, "b": 1}]),
        ([{}], [[]]),
        ([0.1 + 0.2], [0.3]),
        ([math.inf], [-math.inf]),
        (["e\u0301"], ["é"]),
        ([np.array([1, 2])], [[1, 2]]),
        ([np.array([1]), np.array([2])], [np.array([1, 2]), np.array([], int)]),
    ],
)
def test_different_values_have_different_ids(left: list[Any], right: list[Any]) -> None:
    assert content_id("k", *left) != content_id("k", *right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"x": {"b": [1], "a": None}}, {"x": {"a": None, "b": [1]}}),
        (0.0, -0.0),
        ((1, 2), [1, 2]),
        (np.array([1, 2], np.int32), np.array([1, 2], np.int64)),
        (np.array([1, 2], np.uint16), np.array([1, 2], ">i4")),
        (np.array([3, 1, 2])[::2], np.array([3, 2])),
        (np.float64(0.25), 0.25),
    ],
)
def test_equal_values_have_equal_ids(left: object, right: object) -> None:
    assert content_id("k", left) == content_id("k", right)


def test_the_canonical_form_by_hand() -> None:
    """A list of two strings, each with its length before it: tag, uint64 little-endian, bytes."""
    form = b"l\x02\0\0\0\0\0\0\0s\x01\0\0\0\0\0\0\0ks\x02\0\0\0\0\0\0\0ab"
    assert content_id("k", "ab") == hashlib.blake2b(form, digest_size=16).hexdigest()


def test_the_kind_separates_id_spaces() -> None:
    assert content_id("pair", "x") != content_id("prompt", "x")
    assert content_id("pair", "prompt", "x") != content_id("pair", ["prompt", "x"])
    assert content_id("a", "bc") != content_id("ab", "c")


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 1j, np.array([0.5]), np.array([[1]]), np.int64(1), [object()]]
)
def test_a_value_without_a_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="no canonical form"):
        content_id("k", value)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("ab\0é", max_size=3)
    | st.binary(max_size=3)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


def fingerprint(value: Any) -> object:
    """What must decide the id, written independently: types and values, dicts unordered."""
    if isinstance(value, dict):
        return ("map", frozenset((key, fingerprint(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(fingerprint(item) for item in value))
    return (type(value).__name__, value)


@settings(max_examples=500, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=8))
def test_ids_are_equal_exactly_when_values_are(values: list[Any]) -> None:
    # Sibling values built from one another are the likeliest to collide.
    values = [*values, values[:2], [values[:1], *values[1:2]], [values[0]], [[values[0]]]]
    by_id: dict[str, set[object]] = {}
    for value in values:
        by_id.setdefault(content_id("k", value), set()).add(fingerprint(value))
    assert all(len(prints) == 1 for prints in by_id.values())
    assert len(by_id) == len({fingerprint(value) for value in values})


def test_ids_do_not_depend_on_the_process() -> None:
    code = (
        "from pipeline.ids import content_id, unit_interval\n"
        "value = {name: [name, 1, {'z': None, 'a': 0.5}] for name in 'hgfedcba'}\n"
        "print(content_id('k', value), repr(unit_interval('x', 'salt')))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    value = {name: [name, 1, {"a": 0.5, "z": None}] for name in "abcdefgh"}
    assert seen == {f"{content_id('k', value)} {unit_interval('x', 'salt')!r}\n"}


def test_unit_interval_is_uniform() -> None:
    """Ten equal bins of 20,000 draws; the chi-squared bound is the 1 - 1e-6 quantile (9 df)."""
    n = 20_000
    draws = [unit_interval(content_id("draw", i), "salt") for i in range(n)]
    assert min(draws) >= 0
    assert max(draws) < 1
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 44.8
    # Neighbours are not alike: the correlation of 20,000 independent draws is within 5 / sqrt(n).
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / math.sqrt(n)


def test_salts_give_unrelated_draws() -> None:
    names = [f"id-{i}" for i in range(2000)]
    one, two = ([unit_interval(name, salt) for name in names] for salt in ("one", "two"))
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(len(names))
    assert one == [unit_interval(name, "one") for name in names]


@pytest.mark.parametrize("pad", [lambda end: "x" * 63 + end, lambda end: "ä" * 63 + end])
def test_every_character_of_a_salt_counts(pad: Callable[[str], str]) -> None:
    """A plan allows salts of 64 characters, which may be more than BLAKE2b's 64 bytes of key."""
    assert unit_interval("x", pad("1")) != unit_interval("x", pad("2"))


# The form's first implementation, a generator with nothing in it for speed, as the oracle


def slow_id(kind: str, *parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in slow_form([kind, *parts]):
        digest.update(chunk)
    return digest.hexdigest()


def slow_form(value: Any) -> Iterator[bytes]:
    match value:
        case None:
            yield b"n"
        case bool():
            yield b"b1" if value else b"b0"
        case int():
            yield sized(b"i", str(value).encode())
        case float():
            yield sized(b"f", struct.pack("<d", value + 0.0))
        case str():
            yield sized(b"s", value.encode())
        case bytes():
            yield sized(b"y", value)
        case np.ndarray():
            yield sized(b"a", value.astype("<i8").tobytes())
        case Mapping():
            yield b"m" + struct.pack("<Q", len(value))
            for key in sorted(value):
                yield from slow_form(key)
                yield from slow_form(value[key])
        case Sequence():
            yield b"l" + struct.pack("<Q", len(value))
            for item in value:
                yield from slow_form(item)


def sized(tag: bytes, data: bytes) -> bytes:
    return tag + struct.pack("<Q", len(data)) + data


class Word(str, Enum):  # noqa: UP042  # what is tested is a str by a second base
    ONE = "one"


class Number(IntEnum):
    TWO = 2


ODD_KEYS = [{1: "a"}, {True: "a"}, {1.0: "a"}, {b"k": "a"}, {2: 0, 1: 0}, {None: 0}]
UNUSUAL = [
    Word.ONE,
    Number.TWO,
    np.float64(-0.0),
    math.nan,
    10**40,
    range(3),
    UserList([1, [2]]),
    UserDict({"b": 1, "a": {"d": 0, "c": 0}}),
    OrderedDict([("b", 1), ("a", (1, ()))]),
    np.arange(5, dtype=np.uint8)[::-1],
    np.array([], np.int32),
    {Word.ONE: 1, "a": 2},
]


@pytest.mark.parametrize("value", [*ODD_KEYS, *UNUSUAL], ids=repr)
def test_unusual_values_have_the_ids_they_always_had(value: Any) -> None:
    assert content_id("k", value) == slow_id("k", value)
    assert content_id("k", [value], "x") == slow_id("k", [value], "x")
    assert content_id("k", Canonical(value), "x") == slow_id("k", value, "x")


@settings(max_examples=500, deadline=None)
@given(st.lists(VALUES | st.text() | st.dictionaries(st.text(), VALUES), max_size=5))
def test_ids_are_what_they_always_were(values: list[Any]) -> None:
    assert content_id("k", *values) == slow_id("k", *values)
    assert content_id("k", *map(Canonical, values)) == slow_id("k", *values)
    assert content_id("k", Canonical(values)) == slow_id("k", values)
