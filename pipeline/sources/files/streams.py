"""A file's bytes, uncompressed, wherever it is."""

import gzip
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pipeline.errors import SourceError
from pipeline.sources.files.locations import SourceFile, is_local, open_raw, said

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MOST_EXPANSION = 200
"""How many times its compressed length a file may unpack to, once that is much."""

MUCH = 256 << 20
"""Bytes that any file may unpack to."""

_BUFFER = 1 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f


@contextmanager
def readable(file: SourceFile) -> Iterator[None]:
    """Whatever goes wrong inside is a `SourceError` that names the file.

    Its bytes are anybody's, so what the decoding libraries raise is anything.
    """
    try:
        yield
    except Exception as error:
        words = said(error, file.url)
        raise SourceError(f"{file.shown}: cannot be read: {words}") from error


@contextmanager
def uncompressed(file: SourceFile) -> Iterator["io.BufferedReader[Any]"]:
    """The bytes of a file, read as a stream, whatever compression its first bytes say."""
    with open_raw(file) as packed:
        unpacked = _unpacked(packed)
        if unpacked is None:
            yield packed
        else:
            with unpacked, io.BufferedReader(_Limited(unpacked, packed), _BUFFER) as stream:
                yield stream


@contextmanager
def seekable(file: SourceFile) -> Iterator[str | BinaryIO]:
    """The uncompressed bytes to be read in any order: a path, or a remote file's stream."""
    with open_raw(file) as packed:
        if not is_local(file.url) and packed.seekable() and _unpacked(packed) is None:
            yield packed
            return
    with on_disk(file) as path:
        yield path


@contextmanager
def on_disk(file: SourceFile) -> Iterator[str]:
    """The path of the uncompressed bytes: the file's own, or a temporary copy's."""
    with open_raw(file) as packed:
        unpacked = _unpacked(packed)
        if unpacked is None and is_local(file.url):
            yield file.url
            return
        with tempfile.NamedTemporaryFile(prefix="logratio-") as copy:
            source = packed if unpacked is None else _Limited(unpacked, packed)
            shutil.copyfileobj(source, copy, _BUFFER)
            copy.flush()
            yield copy.name


def _unpacked(packed: "io.BufferedReader[Any]") -> gzip.GzipFile | zstd.ZstdFile | None:
    head = packed.peek(4)[:4]
    if head[:2] == _GZIP:
        return gzip.GzipFile(fileobj=packed)
    if head == _ZSTD or (head[1:] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5):
        return zstd.ZstdFile(packed)
    return None


class _Limited(io.RawIOBase):
    """What a decompressor gives, until it gives too much for what went in."""

    def __init__(self, unpacked: gzip.GzipFile | zstd.ZstdFile, packed: BinaryIO) -> None:
        self._unpacked = unpacked
        self._packed = packed
        self._n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_bytes = self._unpacked.readinto(buffer)
        self._n_bytes += n_bytes
        if self._n_bytes > max(MUCH, MOST_EXPANSION * self._packed.tell()):
            raise SourceError(
                f"more than {MOST_EXPANSION} times its compressed {self._packed.tell():,} bytes"
            )
        return n_bytes
