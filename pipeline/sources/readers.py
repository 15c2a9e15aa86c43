"""The readers by the shape they read."""

from collections.abc import Callable

from pipeline.sources.base import Unit
from pipeline.sources.conversational import read_conversational
from pipeline.sources.hh import read_hh

READERS: dict[str, Callable[[dict[str, object]], list[Unit]]] = {
    "conversational": read_conversational,
    "hh": read_hh,
}
"""Shape to reader: one parsed row to its preference units. Raises `RowError`."""
