"""Rows of Parquet files, and of Arrow files and streams, a batch at a time."""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.files.arrow.as_json import TooMuchError, json_rows
from pipeline.sources.files.arrow.claims import check_claims, messages_of_file
from pipeline.sources.files.arrow.parquet_claims import check_footer
from pipeline.sources.files.rows import RawRow, too_long

_BATCH_ROWS = 1000
_ARROW_FILE = b"ARROW1"


def parquet_rows(place: str | BinaryIO, limit: int) -> Iterator[RawRow]:
    """The rows of a Parquet file; page checksums, where it has them, are verified.

    Raises:
        SourceError: it claims more rows, values or bytes than are believed of its size.
    """
    if isinstance(place, str):
        with open(place, "rb") as file:
            check_footer(file)
    else:
        check_footer(place)
    metadata = pq.read_metadata(place)
    leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    with pq.ParquetFile(
        place,
        metadata=metadata,
        # A text that stands in many rows is held once.
        read_dictionary=[leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"],
        page_checksum_verification=True,
        # Not `buffer_size`: a page would be read into as much memory as it claims to be long.
        pre_buffer=False,
        memory_map=True,
    ) as parquet:
        yield from _rows(parquet.iter_batches(batch_size=_BATCH_ROWS), limit)


def arrow_rows(path: str, limit: int) -> Iterator[RawRow]:
    """The rows of an Arrow file or stream (`datasets` writes streams).

    Raises:
        SourceError: a batch claims more values or bytes than are believed of its size.
    """
    with pa.memory_map(path) as source:
        framed = source.read(len(_ARROW_FILE)) == _ARROW_FILE
        source.seek(0)
        if framed:
            with pa.ipc.open_file(source) as file:
                check_claims(messages_of_file(source))
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
                yield from _rows(_checked(batches), limit)
        else:
            check_claims(pa.ipc.MessageReader.open_stream(source))
            source.seek(0)
            with pa.ipc.open_stream(source) as reader:
                yield from _rows(_checked(reader), limit)


def _rows(batches: Iterable[pa.RecordBatch], limit: int) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for data in json_rows(batch.slice(start, _BATCH_ROWS), limit):
                if isinstance(data, TooMuchError):
                    yield RawRow(number, None, b"", too_long(data.n_bytes, limit))
                else:
                    yield RawRow(number, None, data)
                number += 1


def _checked(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)  # or an offset that lies would be followed out of the file
        yield batch
