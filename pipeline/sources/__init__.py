"""Readers: one per published shape of preference data."""

from pipeline.sources.base import RowError, Unit
from pipeline.sources.detect import shape_of
from pipeline.sources.files import SUFFIXES, RawRow, frame_rows
from pipeline.sources.readers import READERS
from pipeline.sources.strict_json import parse_object, parse_row

__all__ = [
    "READERS",
    "SUFFIXES",
    "RawRow",
    "RowError",
    "Unit",
    "frame_rows",
    "parse_object",
    "parse_row",
    "shape_of",
]
