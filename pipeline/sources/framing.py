"""Cutting a JSON-lines file into rows by bytes, so that every row has a place.

Polars' own reader fails a whole file for one bad line and repairs others silently.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.errors import SourceError

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
"""What files of a folder are read."""

_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class RawRow:
    """A row's bytes and place: line number from 0, and byte offset in the uncompressed file."""

    row: int
    byte_offset: int
    data: bytes


def frame_rows(path: Path) -> Iterator[RawRow]:
    r"""The non-blank lines of a JSON-lines file, plain or gzipped (told by its first bytes).

    Lines end with \n (a \r before it belongs to the line end); a byte-order mark at the start of
    the file is dropped. Blank lines count as lines, so row numbers are line numbers.

    Raises:
        SourceError: the file is missing, unreadable, or its compression is broken.
    """
    try:
        with _open(path) as stream:
            offset = 0
            for number, line in enumerate(stream):
                data = line.removeprefix(_BOM) if number == 0 else line
                data = data.rstrip(b"\r\n")
                if data.strip():
                    yield RawRow(number, offset, data)
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as probe:
        compressed = probe.read(2) == _GZIP_MAGIC
    return cast(BinaryIO, gzip.open(path, "rb")) if compressed else path.open("rb")
