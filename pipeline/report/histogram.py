"""Bins for margins: few, of round width, with an edge on zero."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BINS = 64
_TAIL = 0.005
_FEW = 1000
_SAME = 1e-12  # what rounding alone can set margins apart


def margin_histogram(margins: Mapping[str, NDArray[np.float64]]) -> dict[str, Any] | None:
    """Counts per bin of each named sample, over common edges; None without any margin.

    Zero is an edge, so agreement and disagreement never share a bar, unless every margin is the
    same number but for rounding: then one bar stands around it. From 1,000 margins on, those
    beyond the 0.5th and 99.5th percentile are counted in the outermost bins; `n_outside` says how
    many of them lie beyond the edges.

    Args:
        margins: finite float64 arrays [n], beta x nats.

    Returns:
        `edges` (at most 65), `counts` per name with any margin, and `n_outside`.
    """
    pooled = np.concatenate([*margins.values(), np.empty(0)])
    if not pooled.size:
        return None
    edges = _edges(pooled)
    counts = {
        name: np.histogram(np.clip(sample, edges[0], edges[-1]), edges)[0].tolist()
        for name, sample in margins.items()
        if sample.size
    }
    n_outside = int(((pooled < edges[0]) | (pooled > edges[-1])).sum())
    return {"edges": edges, "counts": counts, "n_outside": n_outside}


def _edges(values: NDArray[np.float64]) -> list[float]:
    tail = _TAIL if values.size >= _FEW else 0.0
    low, high = (float(q) for q in np.quantile(values, [tail, 1 - tail]))
    if high - low <= max(_SAME, 1e-9 * max(abs(low), abs(high))):
        half = max(0.5, abs(low) / 2)
        return [low - half, low + half]
    target = min(MAX_BINS - 2, max(20, math.ceil(2 * values.size ** (1 / 3))))  # Rice's rule
    width = _round_up((high - low) / target)
    first = math.floor(low / width)
    last = max(first + 1, math.ceil(high / width))
    # Fifteen digits: 3 x 0.1 shall read 0.3.
    return [float(f"{k * width:.15g}") for k in range(first, last + 1)]


def _round_up(width: float) -> float:
    """The next number of the form 1, 2, 2.5 or 5 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(width))
    return next(step * scale for step in (1, 2, 2.5, 5, 10) if step * scale >= width * (1 - 1e-9))
