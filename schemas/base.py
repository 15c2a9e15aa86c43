"""What tables share: a strict Pandera base model and dtypes used in more than one of them."""

import pandera.polars as pa
import polars as pl

MESSAGE = pl.Struct({"role": pl.String, "content": pl.String})
MESSAGES = pl.List(MESSAGE)
TOKEN_IDS = pl.List(pl.Int32)
SPAN = pl.Struct({"start": pl.Int32, "end": pl.Int32})
SPANS = pl.List(SPAN)

ID = r"^[0-9a-f]{32}$"
"""A content id: BLAKE2b-128 in hex (`pipeline.ids`)."""


class Table(pa.DataFrameModel):
    """A published table: exactly these columns, in this order."""

    class Config:
        """No column beyond those named, none missing."""

        strict = True
        ordered = True


def polars_schema(model: type[pa.DataFrameModel]) -> pl.Schema:
    """The Polars schema of a table model, in column order."""
    columns = model.to_schema().columns
    return pl.Schema({name: column.dtype.type for name, column in columns.items()})
