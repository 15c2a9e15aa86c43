"""Where rows come from: files of every format, wherever they are."""

from pipeline.sources.files.digests import source_digest
from pipeline.sources.files.formats import SUFFIXES
from pipeline.sources.files.framing import frame_rows
from pipeline.sources.files.locations import SourceFile, source_files
from pipeline.sources.files.rows import MAX_ROW_BYTES, RawRow

__all__ = [
    "MAX_ROW_BYTES",
    "SUFFIXES",
    "RawRow",
    "SourceFile",
    "frame_rows",
    "source_digest",
    "source_files",
]
