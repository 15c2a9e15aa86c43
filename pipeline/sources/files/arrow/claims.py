"""What the messages of an Arrow stream claim, before Arrow allocates it.

Arrow gives these numbers nowhere, so the flatbuffers are walked as the format's `Message.fbs` lays
them out; Arrow has verified by then that they are well-formed.
"""

import struct
from collections.abc import Iterable, Iterator

import pyarrow as pa

from pipeline.errors import SourceError

BATCH_BYTES = 512 << 20
"""What a compressed batch may unpack to; it is unpacked whole."""

MANY_VALUES = 1 << 24
"""Values that any array may claim to hold."""

MOST_PER_BYTE = 100
"""How many a longer one may claim for each byte of its batch."""


def check_claims(messages: Iterable[pa.ipc.Message]) -> None:
    """Look at what messages claim, unpacking nothing.

    Raises:
        SourceError: a batch claims more than is believed.
    """
    for message in messages:
        if message.type not in ("record batch", "dictionary"):
            continue
        longest, unpacked = _claims(message)
        n_bytes = message.body.size
        if unpacked > BATCH_BYTES:
            raise SourceError(f"a batch that unpacks to {unpacked:,} bytes is not read")
        if not 0 <= longest <= max(MANY_VALUES, MOST_PER_BYTE * n_bytes):
            raise SourceError(f"{longest:,} values in {n_bytes:,} bytes are not believed")


def messages_of_file(source: pa.NativeFile) -> Iterator[pa.ipc.Message]:
    """The messages that the footer of an Arrow file names, dictionaries first."""
    size = source.size()
    source.seek(size - 10)
    (length,) = struct.unpack("<i6x", source.read())
    source.seek(size - 10 - length)
    footer = memoryview(source.read_buffer(length))
    table = _follow(footer, 0)
    for index in (2, 3):  # Footer.dictionaries, Footer.recordBatches
        for block in _structs(footer, _field(footer, table, index), 24):
            source.seek(_int64(footer, block))
            yield pa.ipc.read_message(source)


def _claims(message: pa.ipc.Message) -> tuple[int, int]:
    """The length of the longest array, and what the compressed buffers unpack to."""
    data, body = memoryview(message.metadata), memoryview(message.body)
    table = _follow(data, 0)
    table = _follow(data, _field(data, table, 2))  # Message.header
    if message.type == "dictionary":
        table = _follow(data, _field(data, table, 1))  # DictionaryBatch.data
    length = _field(data, table, 0)
    longest = _int64(data, length) if length else 0
    for at in _structs(data, _field(data, table, 1)):  # FieldNode: length, null_count
        longest = max(longest, _int64(data, at))
    unpacked = 0
    if _field(data, table, 3):  # RecordBatch.compression
        for at in _structs(data, _field(data, table, 2)):  # Buffer: offset, length
            offset, n_bytes = _int64(data, at), _int64(data, at + 8)
            if n_bytes >= 8:  # it begins with its length, or -1 if it is stored as it is
                unpacked += max(_int64(body, offset), 0)
    return longest, unpacked


def _follow(data: memoryview, at: int) -> int:
    """The place that the offset at `at` points to."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: memoryview, table: int, index: int) -> int:
    """Where a table's field is, or 0 if it is left out."""
    layout = table - int(struct.unpack_from("<i", data, table)[0])
    entry = 4 + 2 * index
    if entry >= struct.unpack_from("<H", data, layout)[0]:
        return 0
    offset = int(struct.unpack_from("<H", data, layout + entry)[0])
    return table + offset if offset else 0


def _structs(data: memoryview, field: int, n_bytes: int = 16) -> range:
    """Where the structs of a vector are, each of so many bytes."""
    if not field:
        return range(0)
    vector = _follow(data, field)
    (length,) = struct.unpack_from("<I", data, vector)
    return range(vector + 4, vector + 4 + n_bytes * length, n_bytes)


def _int64(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<q", data, at)[0])
