"""From a file of any format to its rows, each with its place."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import SourceError
from pipeline.sources.files.arrow.rows import arrow_rows, parquet_rows
from pipeline.sources.files.delimited import cut_records
from pipeline.sources.files.formats import Format, format_of
from pipeline.sources.files.json_array import cut_array
from pipeline.sources.files.json_lines import cut_lines
from pipeline.sources.files.locations import SourceFile
from pipeline.sources.files.rows import MAX_ROW_BYTES, RawRow
from pipeline.sources.files.streams import on_disk, readable, seekable, uncompressed

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_HEAD = 4096


def frame_rows(file: SourceFile | Path, limit: int = MAX_ROW_BYTES) -> Iterator[RawRow]:
    """The rows of a file, in order, read as they are asked for and in bounded memory.

    The compression is told from the first bytes, the format from the name or else the bytes. A
    byte-order mark at the start of a text file is dropped, which its first row says.

    Args:
        file: where it is.
        limit: bytes of a row beyond which it is not held whole, but a `row_too_long`.

    Raises:
        SourceError: the file is missing, unreadable, damaged, in UTF-16, or unpacks to far more
            than it should. Rows before the damage have been given by then.
    """
    if isinstance(file, Path):
        file = SourceFile(file.name, str(file))
    with readable(file):
        with uncompressed(file) as stream:
            head = stream.peek(_HEAD)[:_HEAD]
            kind = format_of(file.name, head.removeprefix(_BOM))
            if kind not in ("parquet", "arrow"):
                if head.startswith(_UTF16):
                    raise SourceError("it is UTF-16 text; convert it to UTF-8")
                marked = head.startswith(_BOM)
                rows = _text_rows(kind, stream, len(stream.read(len(_BOM) * marked)), limit)
                if marked and (first := next(rows, None)) is not None:
                    yield first._replace(byte_order_mark=True)
                yield from rows
                return
        if kind == "parquet":
            with seekable(file) as place:
                yield from parquet_rows(place, limit)
        else:
            with on_disk(file) as path:
                yield from arrow_rows(path, limit)


def _text_rows(kind: Format, stream: BinaryIO, offset: int, limit: int) -> Iterator[RawRow]:
    if kind == "json_array":
        return cut_array(stream, offset, limit)
    if kind == "json_lines":
        return cut_lines(stream, offset, limit)
    return cut_records(stream, offset, limit, delimiter="\t" if kind == "tsv" else ",")
