"""Units as rows of a frame: what a reader gave back, with its place and its content ids."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.ids import Canonical, content_id
from pipeline.sources import Candidate, Label, Unit
from pipeline.sources.base import Message
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
    prompts = _messages(columns.pop("prompt"))
    schema = {name: dtype for name, dtype in UNIT_SCHEMA.items() if name != "prompt"}
    frame = pl.DataFrame(columns, schema=schema).with_columns(prompts.alias("prompt"))
    return frame.select(list(UNIT_SCHEMA))


def _messages(prompts: list[list[Message]]) -> pl.Series:
    """Prompts as one column. Polars itself would make a small frame of every prompt, slowly."""
    offsets = np.zeros(len(prompts) + 1, np.int64)
    np.cumsum([len(prompt) for prompt in prompts], out=offsets[1:])
    turns = [turn for prompt in prompts for turn in prompt]
    roles = pa.array([turn["role"] for turn in turns], pa.large_string())
    contents = pa.array([turn["content"] for turn in turns], pa.large_string())
    structs = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    column = pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets), structs))
    assert isinstance(column, pl.Series)
    return column.cast(MESSAGES)


def _content(unit: Unit | Label | Candidate) -> dict[str, Any]:
    prompt = Canonical([[message["role"], message["content"]] for message in unit.prompt])
    common = {
        "prompt": unit.prompt,
        "prompt_id": content_id("prompt", prompt),
        "meta": _packed(unit.meta),
        "cut_off": _is_cut(unit.meta),
    }
    match unit:
        case Unit():
            return {**common, **_preference(prompt, unit)}
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
        case Candidate():
            identifier = content_id("candidate", prompt, unit.completion, unit.score)
            return {
                **common,
                "kind": CANDIDATE,
                "chosen": unit.completion,
                "chosen_score": unit.score,
                "unit_id": identifier,
                "reverse_id": identifier,
            }


def _preference(prompt: Canonical, unit: Unit) -> dict[str, Any]:
    sides = {
        "kind": PAIR,
        "chosen": unit.chosen,
        "rejected": unit.rejected,
        "strength": unit.strength,
        "unit_id": content_id("pair", prompt, unit.chosen, unit.rejected),
        "reverse_id": content_id("pair", prompt, unit.rejected, unit.chosen),
    }
    if unit.scores is None:
        return sides
    chosen, rejected = unit.scores
    scores = {"chosen_score": chosen, "rejected_score": rejected}
    if unit.strength is None:
        sides["strength"] = chosen - rejected
    return {**sides, **scores, "meta": _packed({**scores, **unit.meta})}


def _packed(meta: dict[str, object]) -> str:
    return json.dumps(meta, ensure_ascii=False, sort_keys=True) if meta else "{}"


def _is_cut(meta: dict[str, object]) -> bool:
    """Whether the source says that a reply ended because it was too long."""
    return any(
        isinstance(value, str) and value in _CUT and name.endswith("finish_reason")
        for name, value in meta.items()
    )
