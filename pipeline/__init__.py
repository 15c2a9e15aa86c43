"""The library: preference pairs to log-prob tables, policies and implicit rewards."""

import os
from pathlib import Path

# On a CPU, torch's idle OpenMP threads spin for long before they sleep. Two such processes on the
# same cores then take each other's time: 153 tokens/s each instead of 282 with this, while one
# process alone is as fast (2 cores). Read when torch is loaded, so it must be set before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _on_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# MKL's matrix products give a row other bits when there are fewer than 16, or on other threads,
# on Intel's CPUs with AVX-512. So no sequence would have the same log-prob in every batch, and
# scoring would have to go row by row, at 0.4 times the speed. This costs nothing that could be
# measured there. On AMD's the bits are the same anyway, and MKL takes slower code with it.
if _on_intel():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
