"""What a file is cut into."""

from typing import NamedTuple

MAX_ROW_BYTES = 64 << 20
"""A longer row is never held whole."""

KEPT_BYTES = 8192
"""What is kept of a row that is too long, enough to recognise it by."""

BLANK = b" \t\r\n"
"""White space between JSON values."""


class RawRow(NamedTuple):
    """One row of a file, as one JSON text whatever the format, and its place.

    Attributes:
        row: from 0: the line's number in JSON lines (blank lines count, and are no rows), the
            record's in every other format.
        byte_offset: where the record begins in the uncompressed file; None in Parquet and Arrow.
        data: the JSON text, not parsed; invalid UTF-8 stands in it as it was.
        fault: (rule, detail) of a row that could not even be cut out as it should: `row_too_long`
            (`data` is its beginning only), `broken_framing`, `invalid_csv`.
        byte_order_mark: this is the file's first row, and a byte-order mark was dropped before it.
    """

    row: int
    byte_offset: int | None
    data: bytes
    fault: tuple[str, str] | None = None
    byte_order_mark: bool = False


def too_long(n_bytes: int, limit: int) -> tuple[str, str]:
    """The fault of a row of more than `limit` bytes."""
    return "row_too_long", f"{n_bytes:,} bytes, more than {limit:,}"
