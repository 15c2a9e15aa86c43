"""Thirty losses with twenty settings each over a million pairs: seconds and peak memory, as JSON.

    python -m benchmarks.losses [--pairs 1000000] [--losses 30] [--settings 20] [--output FILE]

The table is made here, of random log-probs of a policy near its reference.
"""

import argparse
import json
import os
import platform
import resource
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import polars as pl

from pipeline.landscape import answerable, landscape
from pipeline.losses import REGISTRY

ALLOWED_SECONDS, ALLOWED_GIB = 60.0, 4.0


def main() -> None:
    """Measure and print; the exit status is 1 if a full-size run takes more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--losses", type=int, default=30)
    parser.add_argument("--settings", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    table = made(options.pairs)
    wide = answerable(table.columns, ["kl"])
    wide = [name for name in wide if "beta" in REGISTRY[name].parameters]
    if len(wide) < options.losses:
        parser.error(f"{len(wide)} losses have a beta and can be asked")
    grid = {"beta": np.geomspace(0.01, 5.0, options.settings).tolist()}
    began = perf_counter()
    found = landscape(
        table, wide[: options.losses], grid, statistics={"kl": 1.0}, threads=options.threads
    )
    seconds = perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    numbers = {
        "pairs": options.pairs,
        "losses": options.losses,
        "settings": options.settings,
        "rows": found.height,
        "seconds": round(seconds, 2),
        "peak_gib": round(peak, 3),
        "million_pair_settings_per_second": round(options.pairs * found.height / seconds / 1e6, 2),
        "allowed_seconds": ALLOWED_SECONDS,
        "allowed_gib": ALLOWED_GIB,
        "within": seconds <= ALLOWED_SECONDS and peak <= ALLOWED_GIB,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
    }
    text = json.dumps(numbers, indent=1)
    sys.stdout.write(f"{text}\n")
    if options.output is not None:
        options.output.write_text(text)
    sys.exit(0 if numbers["within"] else 1)


def made(n: int, seed: int = 0) -> pl.DataFrame:
    """A table of n pairs: tokens, reference sums, and a policy some nats away."""
    generator = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {}
    for side, learnt in (("chosen", 1.0), ("rejected", -2.0)):
        tokens = generator.integers(5, 500, n)
        columns[f"n_{side}"] = tokens
        columns[f"ref_{side}"] = -tokens * generator.gamma(4.0, 0.25, n)
        moved = generator.normal(learnt, 0.4, n) * np.sqrt(tokens)
        columns[f"policy_{side}"] = np.minimum(columns[f"ref_{side}"] + moved, -1e-3)
    return pl.DataFrame(columns)


if __name__ == "__main__":
    main()
