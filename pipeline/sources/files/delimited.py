"""Cutting CSV and TSV (RFC 4180) into records, each written as a JSON object of its cells."""

import csv
import json
import re
from collections.abc import Iterator
from json.encoder import encode_basestring as quoted
from typing import BinaryIO

from pipeline.errors import SourceError
from pipeline.sources.files.rows import KEPT_BYTES, RawRow, too_long

_BLOCK = 1 << 20

_TEXT_COLUMN = re.compile(
    r"(prompt|instruction|input|output|question|query|answer|system|context|history|chosen|"
    r"rejected|completion|response|reply|text|content|message)s?([_-]?[a-z]|[_-]?\d+)?",
    re.IGNORECASE,
)
"""Names of columns whose cells are what somebody wrote, be it `42` or `true`."""

_LITERAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null", re.ASCII)
_PANDAS = {"True": "true", "False": "false", "": "null"}
"""How pandas writes what is no number."""


def cut_records(stream: BinaryIO, offset: int, limit: int, delimiter: str) -> Iterator[RawRow]:
    """The records of `stream`, which begins at `offset` of its file; the first names the columns.

    A cell that is a JSON list of messages (objects with a `role` or a `from`) is that list, in
    any column. A cell of a column that is not named like a text (`_TEXT_COLUMN`) is the JSON
    number, boolean or null that it spells, and null if it is empty. Every other cell is a string.

    Under `invalid_csv` are a record with more or fewer cells than there are columns, and one whose
    quotes are not RFC 4180's; its end is then the line's, or the file's inside quotes.

    Raises:
        SourceError: the column names cannot be read.
    """
    lines = _Lines(stream, offset, limit)
    # The module's own limit on a cell is 128 KiB and can be set for the process only; ours is
    # on the record, whose lines are counted before the module sees them.
    csv.field_size_limit(max(csv.field_size_limit(), limit + 1))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[tuple[str, bool]] | None = None
    number = 0
    while True:
        lines.begin()
        fault = None
        cells: list[str] = []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = "invalid_csv", str(error)
        except _TooLongError as error:
            fault = too_long(error.n_bytes, limit)
        if columns is None:
            if fault is not None:
                raise SourceError(f"its column names: {fault[1]}")
            if cells:
                columns = [(quoted(c), _TEXT_COLUMN.fullmatch(c.strip()) is None) for c in cells]
            continue
        if fault is None and not cells:
            continue  # a blank line
        if fault is None and len(cells) != len(columns):
            fault = "invalid_csv", f"{len(cells)} cells in {len(columns)} columns"
        if fault is not None:
            data = lines.read()[:KEPT_BYTES]
        else:
            text = ",".join(
                f"{name}:{_value(cell, typed)}"
                for (name, typed), cell in zip(columns, cells, strict=True)
            )
            data = f"{{{text}}}".encode(errors="surrogateescape")
        yield RawRow(number, lines.begun, data, fault)
        number += 1


def _value(cell: str, typed: bool) -> str:
    """The JSON text of a cell."""
    if cell.startswith("[") and cell.endswith("]") and _are_messages(cell):
        return cell
    if typed:
        if _LITERAL.fullmatch(cell):
            return cell
        if cell in _PANDAS:
            return _PANDAS[cell]
    return quoted(cell)


def _are_messages(cell: str) -> bool:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value
    )


class _TooLongError(Exception):
    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes = n_bytes


class _Lines:
    """Lines for the csv module, which asks for more while quotes are open.

    `begun` is where the record under way begins. Bytes that are not UTF-8 become surrogates, and
    bytes again when the record is written.
    """

    def __init__(self, stream: BinaryIO, offset: int, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.begun = offset
        self._n_bytes = 0
        self._lines: list[bytes] = []

    def begin(self) -> None:
        """The next line begins a record."""
        self.begun += self._n_bytes
        self._n_bytes = 0
        self._lines.clear()

    def read(self) -> bytes:
        """The record as it stands in the file, or its beginning if it is too long."""
        return b"".join(self._lines).rstrip(b"\r\n")

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._limit + 1 - self._n_bytes)
        if not line:
            raise StopIteration
        self._lines.append(line)
        self._n_bytes += len(line)
        if self._n_bytes > self._limit:
            self._skip_record()
            raise _TooLongError(self._n_bytes)
        return line.decode(errors="surrogateescape")

    def _skip_record(self) -> None:
        """Read on to the end of the record: the first line end with no quote open."""
        is_open = sum(line.count(b'"') for line in self._lines) % 2 == 1
        line = self._lines[-1]
        while is_open or not line.endswith(b"\n"):
            line = self._stream.readline(_BLOCK)
            if not line:
                break
            self._n_bytes += len(line)
            is_open ^= line.count(b'"') % 2 == 1
