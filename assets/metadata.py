"""Tables as Dagster metadata: rows, columns, path, and a picture."""

import base64
from collections.abc import Mapping
from typing import Any

import dagster as dg

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


def png_markdown(png: bytes, alternative: str) -> dg.MarkdownMetadataValue:
    """A small PNG inside Markdown, which the UI shows."""
    data = base64.b64encode(png).decode()
    return dg.MetadataValue.md(f"![{alternative}](data:image/png;base64,{data})")
