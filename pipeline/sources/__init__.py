"""Readers: one per published shape of preference data."""

from collections.abc import Callable

from pipeline.sources.base import RowError, Unit
from pipeline.sources.conversational import read_conversational
from pipeline.sources.framing import RawRow, frame_rows
from pipeline.sources.hh import read_hh
from pipeline.sources.strict_json import parse_object

READERS: dict[str, Callable[[dict[str, object]], list[Unit]]] = {
    "conversational": read_conversational,
    "hh": read_hh,
}
"""Shape to reader: one parsed row to its preference units. Raises `RowError`."""

__all__ = ["READERS", "RawRow", "RowError", "Unit", "frame_rows", "parse_object"]
