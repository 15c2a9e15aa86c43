"""Processes of their own: a model's memory ends with them, and so does what it breaks."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_CALL_SECONDS = 1800.0
_END_SECONDS = 60.0


class ElsewhereError(RuntimeError):
    """What went wrong in the other process, as text: its classes may not exist here."""


class Elsewhere:
    """A spawned process that does one call after another.

    It leads a process group, so that engine processes it has started end with it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(environment)))
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            wait([self._process.sentinel], _END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()  # in case it had no time to make its group
        self._process.join()

    def call(self, work: Callable[_P, _T], *arguments: _P.args, **keywords: _P.kwargs) -> _T:
        """Have `work` done there: a module-level function.

        Raises:
            ElsewhereError: it raised, the process died, or nothing came for half an hour.
        """
        self._connection.send((work, arguments, keywords))
        if not wait([self._connection, self._process.sentinel], _CALL_SECONDS):
            raise ElsewhereError(f"{work.__name__}: no answer within {_CALL_SECONDS:.0f} s")
        try:
            done, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_END_SECONDS)
            code = self._process.exitcode
            raise ElsewhereError(f"{work.__name__}: its process died with code {code}") from error
        if not done:
            raise ElsewhereError(value)
        result: _T = value
        return result


def elsewhere(
    environment: Mapping[str, str],
    work: Callable[_P, _T],
    *arguments: _P.args,
    **keywords: _P.kwargs,
) -> _T:
    """One call in a process of its own, under `environment` over this one's; see `Elsewhere`."""
    with Elsewhere(environment) as process:
        return process.call(work, *arguments, **keywords)


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)  # before a call's module, and torch or vllm with it, is loaded
    while True:
        try:
            message = connection.recv()
        except EOFError:  # whoever asked is gone
            return
        if message is None:
            return
        work, arguments, keywords = message
        try:
            answer = True, work(*arguments, **keywords)
        except Exception as error:
            traceback.print_exc()
            answer = False, f"{type(error).__name__}: {error}"
        connection.send(answer)
