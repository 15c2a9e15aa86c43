"""Memory of a process and all that it starts (Linux)."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


def peak_of(pid: int, alive: Callable[[], bool], every: float = 0.25) -> int:
    """The largest sum of proportional set sizes seen while a process lives, in bytes.

    A page that several processes share counts once.
    """
    peak = 0
    while alive():
        peak = max(peak, sum(map(_pss, _tree(pid))))
        time.sleep(every)
    return peak


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        if found := _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes()):
            return int(found[1]) * 1024
    return 0
