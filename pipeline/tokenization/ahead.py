"""An iterator that works ahead of whoever takes from it, in a thread of its own."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


@contextmanager
def ahead(items: Iterator[T], most: int = 2) -> Iterator[Iterator[T]]:
    """Items as before, up to `most` of them made before they are asked for.

    What `items` raises is raised to whoever takes the item. On leaving, no more are made.
    """
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=most)
    stopped = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            try:
                made.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # raised again where it is waited for
            put(_END, error)

    def take() -> Iterator[T]:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stopped.set()
        thread.join()
