"""A chunk of rows, from bytes to units on disk; what one process of the intake does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.intake.law import PLACE_SCHEMA
from pipeline.intake.rows.contract import REJECTED_SCHEMA, apply_contract
from pipeline.intake.rows.units import UNIT_SCHEMA, unit_frame
from pipeline.intake.spool import bucket_of, write_parts
from pipeline.rules import Action
from pipeline.sources import (
    READERS,
    Candidate,
    Label,
    RawRow,
    ReadOptions,
    RowError,
    Unit,
    parse_row,
)

RAW_CAP = 2000
"""Characters of a rejected row that are kept."""

SPOOLED_SCHEMA = pl.Schema({**UNIT_SCHEMA, "flags": pl.List(pl.String)})


@dataclass(frozen=True)
class Chunk:
    """Rows of one source that are read together.

    Attributes:
        number: the chunk's, in reading order.
        first: ordinal of its first row.
        rows: the file each row stands in, and the row.
        shape: its reader's.
        options: for the reader.
        evaluation: whether the source is never trained on.
        acts: what is done under each rule.
        units, places: where to write units, cut by bucket, and places.
    """

    number: int
    first: int
    source: str
    rows: list[tuple[str, RawRow]]
    shape: str
    options: ReadOptions
    evaluation: bool
    acts: Mapping[str, Action]
    units: Path
    places: Path


@dataclass(frozen=True)
class ReadChunk:
    """What a chunk gave: the batch of each bucket in its file of units, and what was rejected."""

    number: int
    source: str
    n_rows: int
    batches: dict[int, int]
    rejected: pl.DataFrame
    n_byte_order_marks: int


def read_chunk(chunk: Chunk) -> ReadChunk:
    """Parse a chunk's rows, apply the contract, and write the units that kept it."""
    reader = READERS[chunk.shape]
    places: list[tuple[Any, ...]] = []
    units: list[tuple[dict[str, Any], Unit | Label | Candidate]] = []
    broken: list[tuple[int, int, str, str]] = []
    n_marks = 0
    for ordinal, (file, raw) in enumerate(chunk.rows, start=chunk.first):
        text = raw.data[: 4 * RAW_CAP].decode("utf-8", errors="replace")[:RAW_CAP]
        places.append((ordinal, chunk.source, file, raw.row, raw.byte_offset, text))
        n_marks += raw.byte_order_mark
        try:
            found = reader(parse_row(raw), chunk.options)
        except RowError as error:
            broken.append((ordinal, 0, error.rule, error.detail))
            continue
        place = {
            "ordinal": ordinal,
            "source": chunk.source,
            "file": file,
            "row": raw.row,
            "byte_offset": raw.byte_offset,
            "evaluation": chunk.evaluation,
        }
        for number, unit in enumerate(found):
            if isinstance(unit, RowError):
                broken.append((ordinal, number, unit.rule, unit.detail))
            else:
                units.append(({**place, "unit": number}, unit))
    kept, rejected = apply_contract(unit_frame(units), chunk.acts)
    unread = pl.DataFrame(broken, schema=REJECTED_SCHEMA, orient="row")
    read = pl.DataFrame(places, schema=PLACE_SCHEMA, orient="row").with_columns(part=0)
    write_parts(chunk.places, read, "part")
    return ReadChunk(
        chunk.number,
        chunk.source,
        len(places),
        write_parts(chunk.units, kept.with_columns(bucket=bucket_of()), "bucket"),
        pl.concat([unread, rejected]),
        n_marks,
    )
