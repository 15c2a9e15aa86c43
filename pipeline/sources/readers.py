"""The readers by the shape they read."""

from collections.abc import Callable
from functools import wraps

from pipeline.sources.base import Read, ReadOptions
from pipeline.sources.shapes.alpaca import read_alpaca
from pipeline.sources.shapes.conversational import read_conversational
from pipeline.sources.shapes.helpsteer import read_helpsteer
from pipeline.sources.shapes.hh import read_hh
from pipeline.sources.shapes.openai import read_openai
from pipeline.sources.shapes.ranked import read_nemo, read_ranked
from pipeline.sources.shapes.scored import read_scored, read_ultrafeedback
from pipeline.sources.shapes.sharegpt import read_sharegpt
from pipeline.sources.shapes.standard import read_standard
from pipeline.sources.shapes.unpaired import read_unpaired

Reader = Callable[[dict[str, object], ReadOptions], list[Read]]


def renamed(row: dict[str, object], columns: dict[str, str]) -> dict[str, object]:
    """A row under the field names of its shape.

    Args:
        row: as the source has it.
        columns: a field's name to its column's. A column that a field displaces is kept as
            `<name>_column`.
    """
    named = set(columns.values())
    result = {key: value for key, value in row.items() if key not in named and key not in columns}
    for field, column in columns.items():
        if column in row:
            result[field] = row[column]
    for field in columns:
        if field in row and field not in named:
            name = f"{field}_column"
            while name in row or name in result:
                name += "_column"
            result[name] = row[field]
    return result


def _with_columns(read: Reader) -> Reader:
    @wraps(read)
    def reader(row: dict[str, object], options: ReadOptions) -> list[Read]:
        return read(renamed(row, options.columns) if options.columns else row, options)

    return reader


READERS: dict[str, Reader] = {
    shape: _with_columns(read)
    for shape, read in {
        "hh": read_hh,
        "openai": read_openai,
        "sharegpt": read_sharegpt,
        "alpaca": read_alpaca,
        "conversational": read_conversational,
        "argilla": read_conversational,
        "standard": read_standard,
        "unpaired": read_unpaired,
        "ultrafeedback": read_ultrafeedback,
        "nemo": read_nemo,
        "helpsteer": read_helpsteer,
        "scored": read_scored,
        "ranked": read_ranked,
    }.items()
}
"""Shape to reader: one parsed row to what it gives. Raises `RowError` for a row as a whole.

The order is that of precedence when a shape is found out: what is more particular comes first.
"""
