"""Readers: one per published shape of preference data."""

from pipeline.sources.base import Candidate, Label, Pairing, Read, ReadOptions, RowError, Unit
from pipeline.sources.detect import shape_of
from pipeline.sources.files import (
    SUFFIXES,
    RawRow,
    SourceFile,
    frame_rows,
    source_digest,
    source_files,
)
from pipeline.sources.pairing import pair
from pipeline.sources.readers import READERS, Reader
from pipeline.sources.strict_json import parse_object, parse_row

__all__ = [
    "READERS",
    "SUFFIXES",
    "Candidate",
    "Label",
    "Pairing",
    "RawRow",
    "Read",
    "ReadOptions",
    "Reader",
    "RowError",
    "SourceFile",
    "Unit",
    "frame_rows",
    "pair",
    "parse_object",
    "parse_row",
    "shape_of",
    "source_digest",
    "source_files",
]
