"""How many cores a process that computes takes."""

import os


def threads_of(n_processes: int) -> int:
    """One process's share of this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // n_processes)


def share_cores(n_processes: int) -> None:
    """Leave cores to others: torch and vLLM take this process's share, unless told otherwise.

    Read when torch is loaded, so it must be called before. Does nothing for one process.
    """
    if n_processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_of(n_processes)))
