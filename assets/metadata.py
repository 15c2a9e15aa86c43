"""Tables as Dagster metadata: rows, columns, path, and a picture."""

import base64
from collections.abc import Mapping
from typing import Any

import dagster as dg
import polars as pl

from pipeline.store import TableSnapshot
from schemas import Table


def column_schema(model: type[Table]) -> dg.TableSchema:
    """A table model as Dagster shows it, before the first run too."""
    columns = model.to_schema().columns
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name=name,
                type=str(column.dtype.type),
                description=column.description,
                constraints=dg.TableColumnConstraints(
                    nullable=bool(column.nullable), unique=bool(column.unique)
                ),
            )
            for name, column in columns.items()
        ]
    )


def table_metadata(snapshot: TableSnapshot, name: str) -> dict[str, Any]:
    """Row count, location and digest of a published table."""
    return {
        "dagster/row_count": snapshot.n_rows,
        "dagster/uri": str(snapshot.path),
        "table": dg.MetadataValue.path(snapshot.path.with_name("current.parquet")),
        "dagster/table_name": name,
    }


def counts_markdown(counts: Mapping[str, int], empty: str) -> dg.MarkdownMetadataValue:
    """Counts by name as a Markdown table; the names are ours, never data's."""
    lines = [f"| {name} | {count} |" for name, count in counts.items()]
    return dg.MetadataValue.md("\n".join(["| | n |", "|---|---|", *lines]) if lines else empty)


def examples_markdown(rows: pl.DataFrame, empty: str) -> dg.MarkdownMetadataValue:
    """Quarantined rows (`schemas.QuarantinedRow`) as a Markdown table, their text as text."""
    lines = [
        f"| {row['rule']} | {escaped(row['source'])} {escaped(row['file'])} {row['row']} "
        f"| {escaped(row['detail'])} | {escaped(row['raw'])} |"
        for row in rows.to_dicts()
    ]
    head = ["| rule | row | detail | it begins |", "|---|---|---|---|"]
    return dg.MetadataValue.md("\n".join([*head, *lines]) if lines else empty)


def escaped(text: str, most: int = 200) -> str:
    """The beginning of any text as Markdown that shows just this text, on one line.

    Characters that cannot be seen, or that turn others round, are shown by their numbers.
    """

    def shown(character: str) -> str:
        if character.isalnum() or character == " ":
            return character
        if character.isascii() and character.isprintable():
            return f"&#{ord(character)};"
        return character if character.isprintable() else f"&#92;u{ord(character):04x}"

    return "".join(map(shown, text[:most])) + ("…" if len(text) > most else "")


def png_markdown(png: bytes, alternative: str) -> dg.MarkdownMetadataValue:
    """A small PNG inside Markdown, which the UI shows."""
    data = base64.b64encode(png).decode()
    return dg.MetadataValue.md(f"![{alternative}](data:image/png;base64,{data})")
