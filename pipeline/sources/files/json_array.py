"""Cutting a JSON array into its elements by bytes, whatever stands in them.

A parser would hold the whole file, and stop at the first bad element. Here only brackets, strings
and commas are told apart, so an element that is no JSON costs itself alone, unless its brackets or
quotes do not pair up: then it ends where they do, or with the file.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.sources.files.rows import BLANK, KEPT_BYTES, RawRow, too_long

_BLOCK = 1 << 20
_LEVELS = 6
"""Brackets within brackets that one match takes in; deeper ones are counted one by one."""


def _patterns() -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Whatever belongs to an element: outside its brackets, where a comma ends it, and inside."""
    string = rb'"(?:[^"\\]++|\\.)*+"'
    nested = rb"(?!)"
    for _ in range(_LEVELS):
        nested = rb'[\[{](?:[^"\[\]{}]++|' + string + rb"|" + nested + rb")*+[\]}]"
    # Possessive throughout: what matched is never tried again, so the time is linear.
    inside = rb'(?:[^"\[\]{}]++|' + string + rb"|" + nested + rb")*+"
    return re.compile(inside.replace(b"{}]", b"{},]", 1), re.DOTALL), re.compile(inside, re.DOTALL)


_OUTSIDE, _INSIDE = _patterns()
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def cut_array(stream: BinaryIO, offset: int, limit: int) -> Iterator[RawRow]:
    """The elements of the array that is in `stream`, which begins at `offset` of its file.

    What stands between two commas is a row, be it nothing. Under `broken_framing` are the last
    row of a file that ends inside its array, and whatever comes after the array.
    """
    blocks = _Blocks(stream, offset)
    blocks.at = blocks.block.index(b"[") + 1
    number = 0
    closer = b","
    while closer == b",":
        place = blocks.offset + blocks.at
        data, n_bytes, closer = blocks.element(limit)
        text = data.strip(BLANK)
        if closer == b"]" and not number and not text:
            break  # an empty array
        fault = None
        if n_bytes > limit:
            text, fault = text[:KEPT_BYTES], too_long(n_bytes, limit)
        elif not closer:
            fault = "broken_framing", "the file ends inside the array"
        place += len(data) - len(data.lstrip(BLANK))
        yield RawRow(number, place, text, fault)
        number += 1
    place, data = blocks.tail()
    if data:
        yield RawRow(number, place, data, ("broken_framing", "bytes after the end of the array"))


class _Blocks:
    """A stream's bytes in blocks: `at` is the position in `block`, which begins at `offset`."""

    def __init__(self, stream: BinaryIO, offset: int) -> None:
        self._stream = stream
        self.block = stream.read(_BLOCK)
        self.offset = offset
        self.at = 0

    def element(self, limit: int) -> tuple[bytes, int, bytes]:
        """The bytes up to the next comma or closing bracket, their number, and which it is.

        Of more than `limit` bytes only the beginning; where the file ends first, the third is
        empty. `at` is left behind the comma or bracket.
        """
        start = self.at
        end = _end(_OUTSIDE, self.block, start)
        closer = self.block[end : end + 1]
        if closer not in (b",", b"]"):  # the block's end, a stray `}`, or too many brackets
            return self._long_element(limit)
        self.at = end + 1
        return self.block[start:end], end - start, closer

    def _long_element(self, limit: int) -> tuple[bytes, int, bytes]:
        parts: list[bytes] = []
        n_bytes = depth = 0
        quoted = escaped = False
        start = self.at
        while True:
            block = self.block
            if self.at >= len(block):
                if n_bytes <= limit:
                    parts.append(block[start:])
                n_bytes += len(block) - start
                start = 0
                if not self._next():
                    return b"".join(parts), n_bytes, b""
                self.at, escaped = int(escaped), False
            elif quoted:
                self.at = _end(_STRING, block, self.at)
                if self.at < len(block):  # at the closing quote, or a backslash at the very end
                    escaped = block[self.at] == 0x5C
                    quoted = escaped
                    self.at += 1
            else:
                self.at = _end(_INSIDE if depth else _OUTSIDE, block, self.at)
                byte = block[self.at : self.at + 1]
                if byte == b'"':
                    quoted = True
                elif byte in (b"[", b"{"):
                    depth += 1
                elif byte and depth:
                    depth -= 1
                elif byte in (b",", b"]"):
                    parts.append(block[start : self.at])
                    n_bytes += self.at - start
                    self.at += 1
                    return b"".join(parts), n_bytes, byte
                self.at += bool(byte)

    def tail(self) -> tuple[int, bytes]:
        """Where the first byte is that is not blank, and the beginning of what stands there."""
        place, head = 0, b""
        while True:
            rest = self.block[self.at :]
            if not head:
                rest = rest.lstrip(BLANK)
                place = self.offset + len(self.block) - len(rest)
            head += rest[: KEPT_BYTES - len(head)]
            if not self._next():
                return place, head

    def _next(self) -> bool:
        self.offset += len(self.block)
        self.block = self._stream.read(_BLOCK)
        self.at = 0
        return bool(self.block)


def _end(pattern: re.Pattern[bytes], data: bytes, start: int) -> int:
    match = pattern.match(data, start)
    assert match is not None  # each also matches nothing
    return match.end()
