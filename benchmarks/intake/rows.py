"""Rows of every kind: plain ones, garbage that must be rejected, and what only looks like it.

The kinds of garbage are those that published preference data is known for, each with the rule that
should name it; they are written down from what goes wrong in the world, not from the rules' code.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
Made = list[bytes]

_WORDS = re.findall(
    r"\w+",
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "not but what all were when we there can an your which their said if do will each about how "
    "out them then she many some so these would other into has more her two like him see time "
    "no make than first been its who now people my made over did down only way find use may "
    "long little very after words called just where most know garden river letter answer had "
    "model reward policy margin kettle harbour lantern orchard ticket violin copper meadow",
)


def _text(r: random.Random, n: int) -> str:
    return " ".join(r.choices(_WORDS, k=n))


def plain(r: random.Random, number: int) -> Row:
    """A valid pair that occurs once; a third have two turns before, some a system message."""
    prompt = [{"role": "user", "content": f"{_text(r, 30)} {number}?"}]
    if number % 3 == 0:
        prompt = [
            {"role": "user", "content": _text(r, 12)},
            {"role": "assistant", "content": _text(r, 20)},
            *prompt,
        ]
    if number % 7 == 0:
        prompt = [{"role": "system", "content": "You answer briefly."}, *prompt]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": f"{_text(r, 45)}."}],
        "rejected": [{"role": "assistant", "content": f"{_text(r, 40)}."}],
        "source": "made",
    }


def _packed(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _with(row: Row, side: str, **turn: Any) -> Row:
    return {**row, side: [{**row[side][-1], **turn}]}


def _deep(n: int) -> Any:
    value: Any = 1
    for _ in range(n):
        value = [value]
    return value


def _reverse(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


GARBAGE: dict[str, tuple[str, Callable[[Row], Made]]] = {
    "a line that breaks off": ("invalid_json", lambda row: [_packed(row)[:-40]]),
    "a byte of Latin-1": ("invalid_utf8", lambda row: [_packed(row).replace(b"?", b"\xe9", 1)]),
    "half a surrogate pair": (
        "lone_surrogate",
        lambda row: [_packed(row).replace(b"?", b"\\ud83d", 1)],
    ),
    "NaN as a number": ("nan_literal", lambda row: [_packed(row)[:-1] + b', "score": NaN}']),
    "a key twice": ("duplicate_key", lambda row: [_packed(row)[:-1] + b', "chosen": []}']),
    "a list instead of a row": ("not_an_object", lambda row: [b"[" + _packed(row) + b"]"]),
    "a thousand brackets": ("too_deep", lambda row: [_packed({**row, "x": _deep(900)})]),
    "no rejected": ("missing_field", lambda row: [_packed({**row, "rejected": None})]),
    "a number as content": ("wrong_type", lambda row: [_packed(_with(row, "chosen", content=5))]),
    "a picture": (
        "unsupported_content",
        lambda row: [_packed(_with(row, "chosen", content=[{"type": "image", "url": "a.png"}]))],
    ),
    "a tool call": (
        "unsupported_content",
        lambda row: [_packed(_with(row, "rejected", tool_calls=[{"name": "search"}]))],
    ),
    "an empty reply": ("empty_reply", lambda row: [_packed(_with(row, "rejected", content=""))]),
    "a reply of white space": (
        "empty_reply",
        lambda row: [_packed(_with(row, "chosen", content=" \n\u00a0\u2003"))],
    ),
    "the same reply twice": (
        "identical_replies",
        lambda row: [_packed({**row, "rejected": row["chosen"]})],
    ),
    "the same reply, decomposed and spaced": (
        "identical_replies",
        lambda row: [
            _packed(
                _with(
                    _with(row, "chosen", content="Caf\u00e9  au lait"),
                    "rejected",
                    content="Cafe\u0301 au\tlait\n",
                )
            )
        ],
    ),
    "an unknown role": (
        "unknown_role",
        lambda row: [_packed({**row, "prompt": [{"role": "human", "content": "Hm?"}]})],
    ),
    "no reply at the end": (
        "no_reply",
        lambda row: [_packed({**row, "chosen": [{"role": "user", "content": "And?"}]})],
    ),
    "histories that differ": (
        "prompts_differ",
        lambda row: [
            _packed(
                {
                    "chosen": row["prompt"] + row["chosen"],
                    "rejected": [*row["prompt"][:-1], {"role": "user", "content": "Other?"},
                                 *row["rejected"]],
                }
            )
        ],
    ),
    "no prompt": ("empty_prompt", lambda row: [_packed({**row, "prompt": []})]),
    "both ways round": ("contradicted", lambda row: [_packed(row), _packed(_reverse(row))]),
}  # fmt: skip
"""Kind to the rule that should name it, and how it is made of a plain row (one line or two)."""

NEAR_MISSES: dict[str, Callable[[Row], bytes]] = {
    "the word NaN": lambda row: _packed(_with(row, "chosen", content="NaN, Infinity, null")),
    "a whole surrogate pair": lambda row: _packed(row).replace(b"?", b"\\ud83d\\ude00?", 1),
    "a replacement character": lambda row: _packed(_with(row, "chosen", content="\ufffd ok")),
    "a key again, deeper": lambda row: _packed({**row, "more": {"chosen": 1, "prompt": 2}}),
    "ninety brackets": lambda row: _packed({**row, "x": _deep(90)}),
    "brackets in text": lambda row: _packed(_with(row, "rejected", content="[{" * 300 + "}]" * 9)),
    "one character": lambda row: _packed(_with(row, "chosen", content=".")),
    "another case": lambda row: _packed(
        _with(_with(row, "chosen", content="YES, DO"), "rejected", content="yes, do")
    ),
    "one letter apart": lambda row: _packed(
        _with(row, "rejected", content=row["chosen"][0]["content"] + "!")
    ),
    "user twice": lambda row: _packed(
        {**row, "prompt": [*row["prompt"], {"role": "user", "content": "Please."}]}
    ),
    "a prefilled answer": lambda row: _packed(
        {**row, "prompt": [*row["prompt"], {"role": "assistant", "content": "Well,"}]}
    ),
    "strength 0": lambda row: _packed({**row, "strength": 0}),
    "strength 1e300": lambda row: _packed({**row, "strength": 1e300}),
    "no tool call": lambda row: _packed(_with(row, "chosen", tool_calls=[])),
    "a null field": lambda row: _packed({**row, "note": None}),
    "white space round the row": lambda row: b"  \t" + _packed(row) + b"  ",
    "a line of 100 KB": lambda row: _packed(_with(row, "chosen", content="word " * 20_000)),
    "a NUL": lambda row: _packed(_with(row, "rejected", content="a\x00b")),
    "control strings": lambda row: _packed(
        _with(row, "chosen", content="<|im_end|>\n<|im_start|>system")
    ),
    "an implicit prompt": lambda row: _packed(
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    ),
}
"""What is valid and looks like garbage."""


def lines(n: int, seed: int = 0) -> Iterator[tuple[bytes, str | None]]:
    """`n` rows in a mixed order, each with the rule that should reject it, or None.

    One in a hundred is garbage, of all kinds alike (rows that are garbage together stand apart),
    one in a hundred a near miss, one in a hundred repeats a plain row before it.
    """
    r = random.Random(seed)
    n_garbage = n // 100
    kinds = list(GARBAGE)
    left = {kind: n_garbage // len(kinds) for kind in kinds}
    owed: list[tuple[bytes, str]] = []
    number = 0
    before = plain(r, number)
    spread = n / (3 * n_garbage)  # a place for something special every so many rows
    due = spread
    turn = 0
    for place in range(n):
        number += 1
        if place < due or place >= n - 2:
            yield _packed(before := plain(r, number)), None
            continue
        due += spread
        turn += 1
        match turn % 3:
            case 0:
                yield _packed(before), None
            case 1:
                name = list(NEAR_MISSES)[(turn // 3) % len(NEAR_MISSES)]
                yield NEAR_MISSES[name](plain(r, number)), None
            case _:
                if owed:
                    yield owed.pop()
                    continue
                kind = next((k for k in r.sample(kinds, len(kinds)) if left[k] > 0), None)
                if kind is None:
                    yield _packed(before := plain(r, number)), None
                    continue
                rule, make = GARBAGE[kind]
                row, *others = make(plain(r, number))
                left[kind] -= 1 + len(others)
                owed += [(other, rule) for other in others]
                yield row, rule
