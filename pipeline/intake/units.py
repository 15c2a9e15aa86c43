"""Units as rows of a frame: what a reader gave back, with its place and its content ids."""

import json
from collections.abc import Iterable
from typing import Any

import polars as pl

from pipeline.ids import Canonical, content_id
from pipeline.sources import Candidate, Label, Unit
from schemas import MESSAGES

PAIR, LABEL, CANDIDATE = 0, 1, 2
"""The kinds of a unit."""

UNIT_SCHEMA = pl.Schema(
    {
        "ordinal": pl.UInt64(),
        "unit": pl.UInt32(),
        "kind": pl.UInt8(),
        "source": pl.String(),
        "file": pl.String(),
        "row": pl.Int64(),
        "byte_offset": pl.Int64(),
        "evaluation": pl.Boolean(),
        "prompt": MESSAGES,
        "chosen": pl.String(),
        "rejected": pl.String(),
        "desirable": pl.Boolean(),
        "strength": pl.Float64(),
        "chosen_score": pl.Float64(),
        "rejected_score": pl.Float64(),
        "meta": pl.String(),
        "prompt_id": pl.String(),
        "unit_id": pl.String(),
        "reverse_id": pl.String(),
        "rival": pl.UInt64(),
        "cut_off": pl.Boolean(),
    }
)
"""A unit as read.

`ordinal` is the row's number over all sources, in reading order; `unit` the unit's within its row.
A label's and a candidate's completion is in `chosen`, a candidate's score in `chosen_score`.
`reverse_id` is the id of the opposite statement: the replies exchanged, the other label. `rival` is
the ordinal of the row that the rejected reply of a pair comes from, if it is another.
"""

_CUT = ("length", "max_tokens")


def unit_frame(units: Iterable[tuple[dict[str, Any], Unit | Label | Candidate]]) -> pl.DataFrame:
    """Units with their places (`ordinal`, `unit`, `source` ... `evaluation`) as `UNIT_SCHEMA`."""
    columns: dict[str, list[Any]] = {name: [] for name in UNIT_SCHEMA}
    for place, unit in units:
        row = {**dict.fromkeys(columns), **place, **_content(unit)}
        for name, values in columns.items():
            values.append(row[name])
    return pl.DataFrame(columns, schema=UNIT_SCHEMA)


def _content(unit: Unit | Label | Candidate) -> dict[str, Any]:
    prompt = Canonical([[message["role"], message["content"]] for message in unit.prompt])
    common = {
        "prompt": unit.prompt,
        "prompt_id": content_id("prompt", prompt),
        "meta": _packed(unit.meta),
        "cut_off": _is_cut(unit.meta),
    }
    match unit:
        case Unit(scores=None):
            return {**common, **_sides(prompt, unit), "strength": unit.strength}
        case Unit(scores=(chosen, rejected)):
            strength = chosen - rejected if unit.strength is None else unit.strength
            scores = {"chosen_score": chosen, "rejected_score": rejected}
            meta = _packed({**scores, **unit.meta})
            return {**common, **_sides(prompt, unit), **scores, "strength": strength, "meta": meta}
        case Label():
            said = unit.desirable
            return {
                **common,
                "kind": LABEL,
                "chosen": unit.completion,
                "desirable": said,
                "unit_id": content_id("label", prompt, unit.completion, said),
                "reverse_id": content_id("label", prompt, unit.completion, not said),
            }
        case _:
            identifier = content_id("candidate", prompt, unit.completion, unit.score)
            return {
                **common,
                "kind": CANDIDATE,
                "chosen": unit.completion,
                "chosen_score": unit.score,
                "unit_id": identifier,
                "reverse_id": identifier,
            }


def _sides(prompt: Canonical, unit: Unit) -> dict[str, Any]:
    return {
        "kind": PAIR,
        "chosen": unit.chosen,
        "rejected": unit.rejected,
        "unit_id": content_id("pair", prompt, unit.chosen, unit.rejected),
        "reverse_id": content_id("pair", prompt, unit.rejected, unit.chosen),
    }


def _packed(meta: dict[str, object]) -> str:
    return json.dumps(meta, ensure_ascii=False, sort_keys=True) if meta else "{}"


def _is_cut(meta: dict[str, object]) -> bool:
    """Whether the source says that a reply ended because it was too long."""
    return any(
        isinstance(value, str) and value in _CUT and name.endswith("finish_reason")
        for name, value in meta.items()
    )
