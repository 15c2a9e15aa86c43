"""Cutting JSON lines by bytes, so that every row has a place and one bad line costs one row.

Polars' own reader fails a whole file for one bad line and repairs others silently.
"""

from collections.abc import Iterator
from typing import BinaryIO

from pipeline.sources.files.rows import BLANK, KEPT_BYTES, RawRow, too_long

_BLOCK = 1 << 20


def cut_lines(stream: BinaryIO, offset: int, limit: int) -> Iterator[RawRow]:
    r"""The non-blank lines of `stream`, which begins at `offset` of its file.

    Lines end with \n; \r before it belongs to the line end.
    """
    number = 0
    while line := stream.readline(limit + 1):
        n_bytes = len(line)
        if n_bytes > limit and not line.endswith(b"\n"):
            n_bytes += _skip_line(stream)
            yield RawRow(number, offset, line[:KEPT_BYTES], too_long(n_bytes, limit))
        elif not line.isspace() or line.strip(BLANK):  # a line of \x0b alone is no blank one
            yield RawRow(number, offset, line.rstrip(b"\r\n"))
        number += 1
        offset += n_bytes


def _skip_line(stream: BinaryIO) -> int:
    """Read on to the line's end; how many bytes that were."""
    skipped = 0
    while piece := stream.readline(_BLOCK):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
