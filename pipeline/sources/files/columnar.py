"""Rows of Parquet files, and of Arrow files and streams, a batch at a time."""

import io
import os
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.sources.files.arrow_claims import MANY_VALUES, MOST_PER_BYTE, check_claims
from pipeline.sources.files.arrow_json import TooMuchError, json_rows
from pipeline.sources.files.rows import RawRow, too_long
from pipeline.sources.files.streams import MOST_EXPANSION, MUCH

_BATCH_ROWS = 1000
_BUFFER = 1 << 20
_ARROW_FILE = b"ARROW1"


def parquet_rows(place: str | io.BufferedReader, limit: int) -> Iterator[RawRow]:
    """The rows of a Parquet file; page checksums, where it has them, are verified.

    Raises:
        SourceError: it claims more rows, values or bytes than are believed of its size.
    """
    size = os.path.getsize(place) if isinstance(place, str) else place.seek(0, os.SEEK_END)
    metadata = pq.read_metadata(place)
    _check_footer(metadata, size)
    leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    with pq.ParquetFile(
        place,
        metadata=metadata,
        # A text that stands in many rows is held once.
        read_dictionary=[leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"],
        page_checksum_verification=True,
        pre_buffer=False,
        buffer_size=_BUFFER,
    ) as file:
        yield from _rows(file.iter_batches(batch_size=_BATCH_ROWS), limit)


def arrow_rows(path: str, limit: int) -> Iterator[RawRow]:
    """The rows of an Arrow file or stream (`datasets` writes streams).

    A file is a stream with a frame round it, and is read as that: in order, and without trust in
    the places that its footer names.

    Raises:
        SourceError: a batch claims more values or bytes than are believed of its size.
    """
    with pa.memory_map(path) as source:
        framed = source.read(len(_ARROW_FILE)) == _ARROW_FILE
        start = 8 if framed else 0
        if framed:
            source.seek(source.size() - len(_ARROW_FILE))
            if source.read() != _ARROW_FILE:
                raise SourceError("the file is cut off")
        source.seek(start)
        check_claims(source)
        source.seek(start)
        with pa.ipc.open_stream(source) as reader:
            yield from _rows(_checked(reader), limit)


def _rows(batches: Iterator[pa.RecordBatch], limit: int) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for data in json_rows(batch.slice(start, _BATCH_ROWS), limit):
                if isinstance(data, TooMuchError):
                    yield RawRow(number, None, b"", too_long(data.n_bytes, limit))
                else:
                    yield RawRow(number, None, data)
                number += 1


def _checked(batches: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)  # or an offset that lies would be followed out of the file
        yield batch


def _check_footer(metadata: pq.FileMetaData, size: int) -> None:
    chunks = [
        metadata.row_group(i).column(j)
        for i in range(metadata.num_row_groups)
        for j in range(metadata.num_columns)
    ]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked > max(MUCH, MOST_EXPANSION * size):
        raise SourceError(f"{unpacked:,} bytes in a file of {size:,} are not believed")
    for n_values in (metadata.num_rows, *(chunk.num_values for chunk in chunks)):
        if not 0 <= n_values <= max(MANY_VALUES, MOST_PER_BYTE * size):
            raise SourceError(f"{n_values:,} values in a file of {size:,} bytes are not believed")
