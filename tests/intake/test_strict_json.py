"""Strict JSON: what a lenient parser repairs or hides has a rule."""

import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.sources import RawRow, RowError, parse_object, parse_row


def rule(data: bytes) -> str:
    with pytest.raises(RowError) as caught:
        parse_object(data)
    caught.value.detail.encode()  # it will be written to a table
    assert caught.value.detail
    return caught.value.rule


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a":"\xff"}', "invalid_utf8"),
        (b'{"a":"\xed\xa0\x80"}', "invalid_utf8"),  # a surrogate as bytes
        (b'{"a":"\xc0\x80"}', "invalid_utf8"),  # an overlong NUL
        ('{"a":1}'.encode("utf-16"), "invalid_utf8"),
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"{'a':1}", "invalid_json"),
        (b'{"a":1,}', "invalid_json"),
        (b'{"a":1} {"b":2}', "invalid_json"),
        (b'{"a":"\t"}', "invalid_json"),
        (b'{"a":01}', "invalid_json"),
        (b'{"a":+1}', "invalid_json"),
        (b'{"a":"\\x"}', "invalid_json"),
        (b'{"a":"\\ud83"}', "invalid_json"),
        (b"{a:1}", "invalid_json"),
        (b'// x\n{"a":1}', "invalid_json"),
        (b'\xef\xbb\xbf{"a":1}', "invalid_json"),  # a byte-order mark inside a file
        (b'{"a":' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[]", "not_an_object"),
        (b"1", "not_an_object"),
        (b'"a"', "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"a":1,"a":1}', "duplicate_key"),
        (b'{"a":1,"b":{"x":[{"c":1,"c":2}]}}', "duplicate_key"),
        (b'{"a":1,"\\u0061":2}', "duplicate_key"),
        (b'{"\\ud800":1,"\\ud800":2}', "duplicate_key"),
        (b'{"a":NaN}', "nan_literal"),
        (b'{"a":[{"b":Infinity}]}', "nan_literal"),
        (b'{"a":-Infinity}', "nan_literal"),
        (b'{"a":1e999}', "nan_literal"),
        (b'{"a":-1.5E400}', "nan_literal"),
        (b'{"a":"\\ud800"}', "lone_surrogate"),
        (b'{"a":"x\\udc00y"}', "lone_surrogate"),
        (b'{"a":"\\ude00\\ud83d"}', "lone_surrogate"),
        (b'{"a":[{"\\uDBFF":1}]}', "lone_surrogate"),
        (b'{"a":"\\ud83d\\u0041"}', "lone_surrogate"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "too_deep"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "too_deep"),
        (b'{"a":' * 200_000, "too_deep"),
        (b'{"a":"' + b"\\" * 4 + b'",' + b'"b":' + b"[" * 100_000, "too_deep"),
    ],
)
def test_each_rule(data: bytes, expected: str) -> None:
    assert rule(data) == expected


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a":"\\ud83d\\ude00\\uD83D\\uDE00"}', {"a": "😀😀"}),
        (b'{"a":"\\\\ud800"}', {"a": "\\ud800"}),  # the backslash is the text's own
        (b'{"a":"\\u0000\\u2028\\n"}', {"a": "\0\u2028\n"}),
        ('{"a":"😀\u2028\u200b"}'.encode(), {"a": "😀\u2028\u200b"}),
        (b'{"a":"NaN","b":"Infinity"}', {"a": "NaN", "b": "Infinity"}),
        (b'{"a":1.7976931348623157e308}', {"a": 1.7976931348623157e308}),
        (b'{"a":1e-999}', {"a": 0.0}),
        (b'{"a":{"x":1},"b":{"x":1}}', {"a": {"x": 1}, "b": {"x": 1}}),
        (b' {"a" : [ ] } ', {"a": []}),
        (b'{"a":"' + b"[" * 200_000 + b'"}', {"a": "[" * 200_000}),
        (b'{"a":"\\"' + b"{" * 500 + b'"}', {"a": '"' + "{" * 500}),
        (b'{"a":[' + b"[]," * 500 + b"[]]}", {"a": [[]] * 501}),
    ],
)
def test_what_is_allowed(data: bytes, value: object) -> None:
    assert parse_object(data) == value


def test_the_allowed_depth_does_not_depend_on_our_own_stack() -> None:
    deepest = b'{"a":' * 100 + b"1" + b"}" * 100

    def parse_below(frames: int) -> dict[str, object]:
        return parse_below(frames - 1) if frames else parse_object(deepest)

    room = sys.getrecursionlimit() - len(_frames()) - 150
    assert parse_below(room) == parse_object(deepest) == json.loads(deepest)
    # What was let in can be written again, as `meta` is.
    assert json.loads(json.dumps(parse_object(deepest))) == json.loads(deepest)


def _frames() -> list[object]:
    frames: list[object] = []
    frame = sys._getframe()
    while frame.f_back is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def test_a_hostile_row_takes_no_time() -> None:
    """Quadratic matching of these would take minutes."""
    for data in (
        b"[" * 200 + b'"\\' * 500_000,
        b"[" * 200 + b'"' + b"\\" * 1_000_001,
        b"[" * 200 + b'"' * 1_000_001,
    ):
        assert rule(data) == "too_deep"
    many = b",".join(b'"%d":0' % i for i in range(200_000))
    assert rule(b"{" + many + b',"199999":0}') == "duplicate_key"


JSONISH = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"', b":", b",", b"1", b"1e999", b"NaN", b"\\ud800", b"\\u0041",
         b'"a"', b'"a":', b"null", b"\xff", b"\xc3\xa9", b" ", b"\\", b'{"a":1}', b"-"]
    ),
    max_size=14,
).map(b"".join)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=40) | JSONISH | JSONISH.map(lambda inner: b'{"k":' + inner + b"}"))
@example(b'{"chosen":"\\ud800","chosen":1}')
def test_any_bytes_give_a_dictionary_or_a_row_error(data: bytes) -> None:
    try:
        value = parse_object(data)
    except RowError as error:
        error.detail.encode()
        return
    # Python's own parser must agree, and the value must survive being written.
    assert value == json.loads(data)
    assert json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), JSON_VALUES), st.booleans())
def test_every_json_object_is_read_as_it_is(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_a_fault_of_the_cut_comes_before_what_stands_in_the_row() -> None:
    assert parse_row(RawRow(0, 0, b'{"a":1}')) == {"a": 1}
    with pytest.raises(RowError, match="broken_framing: cut off"):
        parse_row(RawRow(0, 0, b'{"a":1}', ("broken_framing", "cut off")))
