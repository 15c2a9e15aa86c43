"""One function over many tasks, in order, on every core where that pays."""

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from pipeline.processes import threads_of

Task = TypeVar("Task")
Result = TypeVar("Result")

FEW = 3
"""Up to so many tasks are done in this process: another takes seconds to start."""


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """`map`, in as many processes as there are cores, results in the order of the tasks.

    No more tasks are taken than are worked on or about to be, so that they need not fit in memory.
    """
    waiting = iter(tasks)
    first = list(islice(waiting, FEW + 1))
    n_processes = threads_of(1)
    if len(first) <= FEW or n_processes == 1:
        yield from map(function, chain(first, waiting))
        return
    # Not forked: Polars' threads would not survive. Each process computes on one core.
    with (
        _environment("POLARS_MAX_THREADS", "1"),
        ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool,
    ):
        running: deque[Future[Result]] = deque()
        for task in chain(first, waiting):
            running.append(pool.submit(function, task))
            if len(running) > n_processes + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
