"""What tables share: a strict Pandera base model and dtypes used in more than one of them."""

import pandera.polars as pa
import polars as pl
from pandera.config import ValidationDepth, get_config_context

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


def require_validation() -> None:
    """Refuse to run while Pandera's environment variables switch validation off or half off.

    Raises:
        RuntimeError: names the variables.
    """
    config = get_config_context()
    depths = (None, ValidationDepth.SCHEMA_AND_DATA)
    if not config.validation_enabled or config.validation_depth not in depths:
        raise RuntimeError(
            "Pandera does not validate data: unset PANDERA_VALIDATION_ENABLED and "
            "PANDERA_VALIDATION_DEPTH"
        )


def polars_schema(model: type[pa.DataFrameModel]) -> pl.Schema:
    """The Polars schema of a table model, in column order."""
    columns = model.to_schema().columns
    return pl.Schema({name: column.dtype.type for name, column in columns.items()})
