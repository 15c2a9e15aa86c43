"""Readers: one per published shape of preference data."""

from pipeline.sources.base import Candidate, Label, Pairing, Read, ReadOptions, RowError, Unit
from pipeline.sources.detect import shape_of
from pipeline.sources.framing import SUFFIXES, RawRow, frame_rows
from pipeline.sources.pairing import pair
from pipeline.sources.readers import READERS
from pipeline.sources.strict_json import parse_object

__all__ = [
    "READERS",
    "SUFFIXES",
    "Candidate",
    "Label",
    "Pairing",
    "RawRow",
    "Read",
    "ReadOptions",
    "RowError",
    "Unit",
    "frame_rows",
    "pair",
    "parse_object",
    "shape_of",
]
