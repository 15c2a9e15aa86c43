"""Readers: one per published shape of preference data."""

from pipeline.sources.base import Candidate, Label, Pairing, ReadOptions, RowError, Unit
from pipeline.sources.detect import shape_of
from pipeline.sources.framing import SUFFIXES, RawRow, frame_rows
from pipeline.sources.readers import READERS
from pipeline.sources.strict_json import parse_object

__all__ = [
    "READERS",
    "SUFFIXES",
    "Candidate",
    "Label",
    "Pairing",
    "RawRow",
    "ReadOptions",
    "RowError",
    "Unit",
    "frame_rows",
    "parse_object",
    "shape_of",
]
