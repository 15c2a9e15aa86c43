r"""Readers: rows by bytes, strict JSON, and the published shapes of preference data."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.sources import READERS, RawRow, RowError, Unit, frame_rows, parse_object
from pipeline.sources.base import Message


def turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


ASK, ANSWER, OTHER = turn("user", "q?"), turn("assistant", "yes"), turn("assistant", "no")


# Framing


def framed(tmp_path: Path, data: bytes) -> list[RawRow]:
    path = tmp_path / "rows"
    path.write_bytes(data)
    return list(frame_rows(path))


def lines_by_hand(data: bytes) -> list[tuple[int, int, bytes]]:
    """Rows found by searching for newlines, byte by byte."""
    rows, start, number = [], 0, 0
    for end in [i for i, byte in enumerate(data) if byte == 0x0A] + [len(data)]:
        line = data[start:end]
        if number == 0 and line[:3] == b"\xef\xbb\xbf":
            line = line[3:]
        while line[-1:] == b"\r":
            line = line[:-1]
        if line.strip(b" \t\n\r\x0b\x0c"):
            rows.append((number, start, line))
        start, number = end + 1, number + 1
    return rows


FILES = {
    "plain": b'{"a":1}\n{"b":2}\n',
    "no final newline": b'{"a":1}\n{"b":2}',
    "crlf": b'{"a":1}\r\n{"b":2}\r\n{"c":3}',
    "byte-order mark": b'\xef\xbb\xbf{"a":1}\n\xef\xbb\xbf{"b":2}\n',
    "byte-order mark alone": b"\xef\xbb\xbf\n{}",
    "blank lines": b'\n\n{"a":1}\n \t\r\n{"b":2}\n\n',
    "multi-byte": '{"é":"😀"}\n{"a":"\u2028\x85"}\n'.encode(),
    "carriage return inside": b'{"a":\r1}\n',
    "invalid utf-8": b"\xff\xfe\n\x80\n",
    "nul": b"\0\n\0\0",
    "empty": b"",
    "newline alone": b"\n",
    "a megabyte": b'{"a":"' + b"x" * (1 << 20) + b'"}\n{}\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_rows_have_their_place(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    data = FILES[name]
    rows = framed(tmp_path, pack(data))
    assert [(row.row, row.byte_offset, row.data) for row in rows] == lines_by_hand(data)
    for row in rows:
        mark = b"\xef\xbb\xbf" if row.row == 0 and data.startswith(b"\xef\xbb\xbf") else b""
        assert data[row.byte_offset :].startswith(mark + row.data)


def test_places_in_a_small_file(tmp_path: Path) -> None:
    rows = framed(tmp_path, b'\xef\xbb\xbf{"a":1}\r\n\n{"\xc3\xa9":2}\n[3]')
    assert rows == [
        RawRow(0, 0, b'{"a":1}'),
        RawRow(2, 13, b'{"\xc3\xa9":2}'),
        RawRow(3, 22, b"[3]"),
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"\n", b"\r", b"{", b" ", b"\xef\xbb\xbf", b"\xc3\xa9", b"\0"])))
def test_any_bytes_are_framed_as_by_hand(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    data = b"".join(parts)
    rows = framed(tmp_path_factory.getbasetemp(), data)
    assert [(row.row, row.byte_offset, row.data) for row in rows] == lines_by_hand(data)


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    rows = framed(tmp_path, gzip.compress(b"{}\n[") + gzip.compress(b"]\n"))
    assert [(row.byte_offset, row.data) for row in rows] == [(0, b"{}"), (3, b"[]")]


PACKED = gzip.compress(b"".join(b'{"n":%d}\n' % i for i in range(5000)))


@pytest.mark.parametrize(
    "data",
    [
        PACKED[: len(PACKED) // 2],
        PACKED[:-1],
        PACKED[:2],
        PACKED[:100] + b"\xff\x00\xff\x00" + PACKED[104:],
        PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:],  # the checksum
        PACKED + b"junk",
    ],
)
def test_broken_compression_is_an_error_and_names_the_file(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SourceError, match=f"{tmp_path / 'rows'}: cannot be read"):
        framed(tmp_path, data)


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SourceError, match=f"{path}: cannot be read"):
            list(frame_rows(path))


# Strict JSON


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


FIELDS = st.sampled_from(["prompt", "chosen", "rejected", "strength", "role", "content", "x"])
MESSY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "user", "assistant", "\n\nHuman: a", "\n\nAssistant: b", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(READERS)), st.dictionaries(FIELDS, MESSY))
@example("conversational", {"chosen": [ANSWER], "rejected": [OTHER], "strength": 10**400})
@example("conversational", {"chosen": [{}], "rejected": [[]]})
def test_any_object_gives_units_or_a_row_error(shape: str, row: dict[str, object]) -> None:
    try:
        units = READERS[shape](row)
    except RowError:
        return
    for unit in units:
        assert all(isinstance(text, str) for text in (unit.chosen, unit.rejected))
        assert all(
            isinstance(message[key], str) for message in unit.prompt for key in ("role", "content")
        )


# Conversational


def conversational(**row: object) -> Unit:
    (unit,) = READERS["conversational"](row)
    return unit


def refused(shape: str, row: dict[str, object]) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        READERS[shape](row)
    return caught.value.rule, caught.value.detail


def test_an_explicit_and_an_implicit_prompt_are_one_pair() -> None:
    system = turn("system", "be brief")
    explicit = conversational(prompt=[system, ASK], chosen=[ANSWER], rejected=[OTHER])
    implicit = conversational(chosen=[system, ASK, ANSWER], rejected=[system, ASK, OTHER])
    mixed = conversational(prompt=[system], chosen=[ASK, ANSWER], rejected=[ASK, OTHER])
    null = conversational(prompt=None, chosen=[system, ASK, ANSWER], rejected=[system, ASK, OTHER])
    assert explicit == implicit == mixed == null == Unit([system, ASK], "yes", "no", None, {})


def test_other_fields_survive_in_meta() -> None:
    unit = conversational(
        prompt=[ASK], chosen=[ANSWER], rejected=[OTHER], strength=2, source="x", score={"a": [1]}
    )
    assert unit.meta == {"source": "x", "score": {"a": [1]}}
    assert (unit.strength, type(unit.strength)) == (2.0, float)


@pytest.mark.parametrize(("strength", "expected"), [(None, None), (0, 0.0), (-1.5, -1.5), (3, 3.0)])
def test_a_strength_is_a_number_or_nothing(strength: object, expected: float | None) -> None:
    unit = conversational(chosen=[ASK, ANSWER], rejected=[ASK, OTHER], strength=strength)
    assert unit.strength == expected


@pytest.mark.parametrize(
    ("change", "rule", "names"),
    [
        ({"chosen": None}, "missing_field", "'chosen'"),
        ({"rejected": None}, "missing_field", "'rejected'"),
        ({"chosen": "text"}, "wrong_type", "'chosen' is a str"),
        ({"rejected": {}}, "wrong_type", "'rejected' is a dict"),
        ({"prompt": "text"}, "wrong_type", "'prompt' is a str"),
        ({"prompt": False}, "wrong_type", "'prompt' is a bool"),
        ({"chosen": [ASK, "yes"]}, "wrong_type", "chosen[1] is a str"),
        ({"chosen": [ASK, None]}, "wrong_type", "chosen[1]"),
        ({"chosen": [ASK, {"content": "x"}]}, "missing_field", "chosen[1] has no 'role'"),
        ({"chosen": [ASK, {"role": "assistant"}]}, "missing_field", "chosen[1] has no 'content'"),
        ({"chosen": [ASK, turn("assistant", 5)]}, "wrong_type", "chosen[1].content is a int"),
        ({"chosen": [ASK, turn("assistant", None)]}, "wrong_type", "chosen[1].content"),
        ({"chosen": [{"role": 1, "content": "x"}]}, "wrong_type", "chosen[0].role is a int"),
        (
            {"rejected": [turn("user", [{"type": "text", "text": "q?"}]), OTHER]},
            "unsupported_content",
            "rejected[0].content is a list",
        ),
        (
            {"chosen": [ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}]},
            "unsupported_content",
            "chosen[1] has 'tool_calls'",
        ),
        (
            {"prompt": [{**ASK, "images": ["x.png"]}]},
            "unsupported_content",
            "prompt[0] has 'images'",
        ),
        ({"chosen": []}, "no_reply", "chosen"),
        ({"rejected": [ASK]}, "no_reply", "rejected"),
        ({"chosen": [turn("user", "p?"), ANSWER]}, "prompts_differ", "turn 0"),
        ({"chosen": [ASK, OTHER, ASK, ANSWER]}, "prompts_differ", "turn 1"),
        ({"strength": True}, "wrong_type", "bool"),
        ({"strength": "3"}, "wrong_type", "str"),
        ({"strength": [1]}, "wrong_type", "list"),
        ({"strength": 10**400}, "strength_not_finite", "float64"),
    ],
)
def test_each_fault_of_a_conversation(change: dict[str, Any], rule: str, names: str) -> None:
    good = {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER], "strength": 1}
    assert conversational(**good).chosen == "yes"
    found, detail = refused("conversational", {**good, **change})
    assert found == rule
    assert names in detail


def test_empty_tool_fields_are_plain_text() -> None:
    """Some publishers write every key on every turn."""
    plain = {**ANSWER, "tool_calls": None, "images": [], "name": "x"}
    assert conversational(chosen=[ASK, plain], rejected=[ASK, OTHER]).chosen == "yes"


# HH-RLHF


def hh(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


def test_a_transcript_of_several_turns() -> None:
    shared = ("Human: How?", "Assistant: Like this.\n\nThen that.", "Human:  And: Human: why? ")
    (unit,) = READERS["hh"](
        {
            "chosen": hh(*shared, "Assistant: Because."),
            "rejected": hh(*shared, "Assistant: No"),
            "k": 1,
        }
    )
    assert unit == Unit(
        [
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": "Like this.\n\nThen that."},
            {"role": "user", "content": "And: Human: why?"},
        ],
        "Because.",
        "No",
        None,
        {"k": 1},
    )


def test_a_role_that_repeats_is_kept_as_it_is() -> None:
    shared = ("Human: a", "Human: b", "Assistant: c")
    (unit,) = READERS["hh"](
        {"chosen": hh(*shared, "Assistant: d"), "rejected": hh(*shared, "Assistant: e")}
    )
    assert [message["role"] for message in unit.prompt] == ["user", "user", "assistant"]
    assert (unit.chosen, unit.rejected) == ("d", "e")


@pytest.mark.parametrize(
    ("chosen", "rule", "names"),
    [
        (None, "missing_field", "'chosen'"),
        ([ASK, ANSWER], "wrong_type", "list"),
        ("", "not_a_transcript", "'chosen'"),
        ("just text", "not_a_transcript", "'chosen'"),
        ("Well. " + hh("Human: q?", "Assistant: yes"), "not_a_transcript", "'chosen'"),
        ("\n\nhuman: q?\n\nassistant: yes", "not_a_transcript", "'chosen'"),
        (hh("Human:"), "no_reply", "chosen"),
        (hh("Human: q?"), "no_reply", "chosen"),
        (hh("Human: q?", "Assistant: yes", "Human: more?"), "no_reply", "chosen"),
        (hh("Human: p?", "Assistant: yes"), "prompts_differ", "turn 0"),
        (
            hh("Human: q?", "Assistant: yes", "Human: r?", "Assistant: s"),
            "prompts_differ",
            "turn 1",
        ),
        (hh("Assistant: yes"), "prompts_differ", "turn 0"),
    ],
)
def test_each_fault_of_a_transcript(chosen: object, rule: str, names: str) -> None:
    found, detail = refused("hh", {"chosen": chosen, "rejected": hh("Human: q?", "Assistant: no")})
    assert found == rule
    assert names in detail


def test_white_space_before_the_first_turn_is_no_text() -> None:
    (unit,) = READERS["hh"](
        {
            "chosen": " \n" + hh("Human: q?", "Assistant: a"),
            "rejected": hh("Human: q?", "Assistant:"),
        }
    )
    assert (unit.prompt, unit.chosen, unit.rejected) == ([ASK], "a", "")


def test_every_shape_of_a_plan_has_a_reader() -> None:
    from typing import get_args

    from pipeline.plan import SourceConfig

    assert set(get_args(SourceConfig.model_fields["shape"].annotation)) == set(READERS)
