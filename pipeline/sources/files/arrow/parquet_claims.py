"""What a Parquet file's footer claims, before Arrow acts on it.

Arrow's own view of a footer that lies about its columns ends the process (an exception of C++ that
nothing catches), so the footer is read here, in Thrift's compact protocol, by the field numbers of
the format's `parquet.thrift`.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.errors import SourceError
from pipeline.sources.files.arrow.claims import MANY_VALUES, MOST_PER_BYTE
from pipeline.sources.files.streams import MOST_EXPANSION, MUCH

MAX_SCHEMA_DEPTH = 64
"""Columns within columns; Arrow follows them on the stack."""


def check_footer(file: BinaryIO) -> None:
    """Read the footer.

    Raises:
        SourceError: it claims more rows, values or bytes than are believed of the file's size.
        ValueError, IndexError, struct.error: it is no footer.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length, magic = struct.unpack("<I4s", file.read(8))
    if magic != b"PAR1" or length + 8 > size:
        raise ValueError("no Parquet footer at its end")
    file.seek(size - 8 - length)
    footer = _Compact(file.read(length)).struct()
    if _depth(footer[2]) > MAX_SCHEMA_DEPTH:
        raise SourceError(f"columns more than {MAX_SCHEMA_DEPTH} deep in one another")
    columns = [chunk[3] for group in footer[4] for chunk in group[1]]
    unpacked = sum(column[6] for column in columns)
    if unpacked > max(MUCH, MOST_EXPANSION * size):
        raise SourceError(f"{unpacked:,} bytes in a file of {size:,} are not believed")
    for n_values in (footer[3], *(column[5] for column in columns)):
        if not 0 <= n_values <= max(MANY_VALUES, MOST_PER_BYTE * size):
            raise SourceError(f"{n_values:,} values in a file of {size:,} bytes are not believed")


def _depth(schema: list[dict[int, Any]]) -> int:
    """How deep the columns are, which stand as in a walk over their tree: parents first."""
    deepest = 0
    open_children: list[int] = []
    for element in schema:
        while open_children and not open_children[-1]:
            open_children.pop()
        if open_children:
            open_children[-1] -= 1
        open_children.append(element.get(5, 0))
        deepest = max(deepest, len(open_children))
    return deepest


class _Compact:
    """Reads Thrift's compact protocol; structs are dictionaries by field number."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):  # a truth value in a list, or a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._unsigned())
        if kind in (9, 10):
            return list(self._elements())
        if kind == 12:
            return self.struct()
        raise ValueError(f"no such Thrift type: {kind}")  # a map too: Parquet's footer has none

    def _elements(self) -> Iterator[Any]:
        head = self._byte()
        size = head >> 4 if head >> 4 != 15 else self._unsigned()
        for _ in range(size):
            yield self._value(head & 15)

    def _skip(self, n_bytes: int) -> None:
        self._at += n_bytes
        if self._at > len(self._data):
            raise ValueError("the Parquet footer is cut off")

    def _byte(self) -> int:
        byte = self._data[self._at]
        self._at += 1
        return byte

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("no Thrift integer")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
