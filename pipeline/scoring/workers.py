"""The `local` executor: who runs an engine, one process or several.

On a CPU one worker is this process itself, over all its cores. On GPUs there is one process per
device (or parallel group of devices): its memory belongs to it, and it may die. Workers pull items
and commit what they make; what a dead one had in flight is done again by another. An item that
engines die of again is divided, until it is known what they die of.
"""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.util import Finalize
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

from pipeline.errors import ScoringError
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig
from pipeline.processes import threads_of
from pipeline.scoring.deaths import ATTEMPTS, Deaths, Divide, Lost, Waiting
from pipeline.scoring.engines.base import Engine, EngineDied, Numerics, Open

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item", contravariant=True)
_Result = TypeVar("_Result", covariant=True)
Report = Callable[[int, int], None]
"""Told of (rows, tokens) done while an item is worked on."""


@dataclass(frozen=True)
class Opening:
    """How a worker opens its engine; travels to other processes."""

    open_engine: Open
    config: ModelConfig
    checkpoint: Checkpoint
    longest: int

    def open(self) -> Engine:
        """Load the model."""
        return self.open_engine(self.config, self.checkpoint, self.longest)


class Task(Protocol[_Item, _Result]):
    """What a worker does with its engine and one item; a module-level function."""

    def __call__(self, engine: Engine, item: _Item, report: Report | None, /) -> _Result:
        """Do it; called again with the same item if an engine died of it.

        In another process there is nobody to report to.
        """
        ...


class Run(Protocol):
    """Has items done by the workers."""

    def __call__(
        self,
        task: Task[Any, Any],
        items: Sequence[Any],
        report: Report | None,
        divide: Divide | None = None,
    ) -> Iterator[Any]:
        """The items' results, in the order in which they are done; `Lost` for some if divided."""
        ...


@contextmanager
def workers(opening: Opening, numerics: Numerics, n_workers: int | None) -> Iterator[Run]:
    """The workers of one pass over one model; they and their engines end with the block.

    Args:
        opening: how an engine is opened; one is opened only once there is an item.
        numerics: of the scorer; its device class and parallelism say what a worker occupies.
        n_workers: processes, or None for one per device group (one on a CPU).

    Raises:
        ScoringError: inside the block, engines died of work that cannot be divided, or too often.
    """
    on_gpu = numerics.device_class.startswith("cuda")
    if not on_gpu and (n_workers or 1) == 1:
        with _here(opening) as run:
            yield run
    else:
        places = _gpu_places(numerics, n_workers) if on_gpu else _cpu_places(n_workers or 1)
        with _in_processes(opening, places) as run:
            yield run


def _cpu_places(n_workers: int) -> list[dict[str, str]]:
    """Environment of each worker on a CPU: its share of the cores."""
    threads = str(threads_of(n_workers))
    return [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}] * n_workers


def _gpu_places(numerics: Numerics, n_workers: int | None) -> list[dict[str, str]]:
    """Environment of each worker on GPUs: its devices, as many as one model is spread over.

    Raises:
        ScoringError: there are fewer devices than that.
    """
    devices = _visible_devices()
    size = numerics.tensor_parallel * numerics.pipeline_parallel
    groups = [devices[i : i + size] for i in range(0, len(devices) - size + 1, size)]
    if len(groups) < (n_workers or 1):
        raise ScoringError(
            f"scoring.workers: {n_workers or 1} workers of {size} devices each, and "
            f"{len(devices)} devices are visible"
        )
    # vLLM's engine runs in the worker's process itself: in another one it begins before all rows
    # have arrived, so that equal calls make unequal batches.
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(group), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        for group in groups[:n_workers]
    ]


def _visible_devices() -> list[str]:
    """Names or numbers of the GPUs, as CUDA reads its variable: up to the first that is none."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(i) for i in range(torch.cuda.device_count())]
    names = (name.strip() for name in visible.split(","))
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


@contextmanager
def _here(opening: Opening) -> Iterator[Run]:
    """One worker in this process; an engine that dies is opened once more."""
    engines: list[Engine] = []

    def close() -> None:
        while engines:
            engines.pop().close()

    def run(
        task: Task[Any, Any],
        items: Sequence[Any],
        report: Report | None,
        divide: Divide | None = None,
    ) -> Iterator[Any]:
        waiting = [Waiting(item) for item in reversed(items)]
        deaths = Deaths()
        while waiting:
            one = waiting.pop()
            if not engines:
                engines.append(opening.open())
            try:
                result = task(engines[0], one.item, report)
            except EngineDied as error:
                close()
                deaths.count(error)
                smaller = one.after(error, divide)
                if isinstance(smaller, Lost):
                    yield smaller
                else:
                    waiting += reversed(smaller)
                _log.warning("opening another engine: %s", error)
            else:
                deaths.in_a_row = 0
                yield result

    try:
        yield run
    finally:
        close()


@contextmanager
def _in_processes(opening: Opening, places: list[dict[str, str]]) -> Iterator[Run]:
    """Several workers, each in a process of its own; when one dies, all are started anew."""
    pools: list[_Pool] = []

    def close() -> None:
        while pools:
            pools.pop().close()

    def run(
        task: Task[Any, Any],
        items: Sequence[Any],
        report: Report | None,
        divide: Divide | None = None,
    ) -> Iterator[Any]:
        numbers = itertools.count()
        waiting = {next(numbers): Waiting(item) for item in items}
        deaths, fruitless = Deaths(), 0
        while waiting:
            if not pools:
                pools.append(_Pool(places))
            before = set(waiting)
            futures: dict[Future[Any], int] = {}
            broken: list[Exception] = []
            try:
                for i, one in waiting.items():
                    futures[pools[0].executor.submit(_on_worker, opening, task, one.item)] = i
            except BrokenProcessPool as error:  # a worker died before, maybe while it waited
                broken.append(error)
            for future in as_completed(futures):
                try:
                    result = future.result()
                except _NotTried:
                    continue
                except EngineDied as error:
                    broken.append(error)
                    deaths.count(error)
                    smaller = waiting.pop(futures[future]).after(error, divide)
                    if isinstance(smaller, Lost):
                        yield smaller
                    else:
                        waiting |= {next(numbers): one for one in smaller}
                    continue
                except BrokenProcessPool as error:
                    broken.append(error)
                    continue
                deaths.in_a_row = 0
                del waiting[futures[future]]
                yield result
            if not broken:
                continue
            # The one that knows why, if there is one.
            cause = min(broken, key=lambda death: not isinstance(death, EngineDied))
            if futures:
                fruitless = fruitless + 1 if set(waiting) == before else 0
            if fruitless == ATTEMPTS:
                raise ScoringError(
                    f"workers died {fruitless} times over {len(waiting)} parts: {cause}"
                ) from cause
            _log.warning("starting workers anew for %d parts: %s", len(waiting), cause)
            close()  # an engine that died may have left its memory taken

    try:
        yield run
    finally:
        close()


class _Pool:
    """Processes that know their place, and of which it is known what processes they started."""

    def __init__(self, places: list[dict[str, str]]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
        free = context.SimpleQueue()
        for place in places:
            free.put(place)
        self._started = context.SimpleQueue()
        self.executor = ProcessPoolExecutor(
            len(places), context, initializer=_take_place, initargs=(free, self._started)
        )

    def close(self) -> None:
        """End the workers once they have done what they are at, and what they may have left.

        A worker that was killed leaves vLLM's engine core behind, which holds the model's memory.
        """
        self.executor.shutdown(cancel_futures=True)
        while not self._started.empty():
            pid, began = self._started.get()
            end = monotonic() + 10
            while _began(pid) == began and monotonic() < end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                sleep(0.01)


def _began(pid: int) -> str | None:
    """When a living process began, which tells it from a later one of the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] == "Z" else stat[19]


_opened: list[Engine] = []
"""In a worker's process: its engine, loaded at its first item."""

_died: list[bool] = []
"""In a worker's process: whether its engine died. It then takes no other item, and is replaced."""


class _NotTried(EngineDied):
    """An item came to a worker whose engine had died of another one.

    The worker does not end by itself: the others would be ended with it, over what they are at.
    """


_tell_started: "list[SimpleQueue[tuple[int, str]]]" = []
"""In a worker's process: where its parent learns of processes that an engine starts."""


def _take_place(
    free: "SimpleQueue[dict[str, str]]", started: "SimpleQueue[tuple[int, str]]"
) -> None:
    """Prepare a worker's process: however it ends, its engine's own processes must not stay.

    They would hold a GPU's memory, and the workers that are started anew would find it taken.
    """
    os.environ.update(free.get())
    _tell_started.append(started)
    Finalize(None, _close_engine, exitpriority=10)
    # A pool that breaks ends its other workers with this signal.
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _close_engine() -> None:
    while _opened:
        _opened.pop().close()


def _end(*_: object) -> None:
    try:
        _close_engine()
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        os._exit(1)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers, which would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        threading.Timer(30, os._exit, [1]).start()  # the engine may be busy
        _end()


def _on_worker(opening: Opening, task: Task[Any, Any], item: Any) -> Any:
    if _died:
        raise _NotTried
    if not _opened:
        _opened.append(opening.open())
        for process in multiprocessing.active_children():
            if process.pid is not None and (began := _began(process.pid)) is not None:
                _tell_started[0].put((process.pid, began))
    try:
        return task(_opened[0], item, None)
    except EngineDied:
        _close_engine()
        _died.append(True)
        raise
