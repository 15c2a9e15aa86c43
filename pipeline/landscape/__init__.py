"""Score once, ask anything: many losses over many settings, of one table of cached log-probs."""

from pipeline.landscape.compute import answerable, landscape
from pipeline.landscape.figure import landscape_png

__all__ = ["answerable", "landscape", "landscape_png"]
