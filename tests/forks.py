"""Processes that are cheap to kill: forked from a server that has imported everything.

A process that imports torch, transformers and PEFT by itself takes six seconds of a core.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

import pytest

from pipeline import failpoints

KILLED = -signal.SIGKILL
CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = (
    *("torch", "peft", "tokenizers", "transformers.models.llama.modeling_llama"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("pipeline.intake", "pipeline.stages", "pipeline.export.directory", __name__),
)
"""What the server imports; it computes nothing, so that no thread is lost in a fork."""


def begin(work: Callable[..., None], *arguments: object, fail: str = "") -> ForkServerProcess:
    """Begin some work in a process of its own; `fail` as `LOGRATIO_FAIL`."""
    serve()
    process = CONTEXT.Process(target=_work, args=(work, arguments, fail))
    process.start()
    return process


def ended(process: ForkServerProcess) -> int:
    """Wait for it: 0, or minus the number of the signal that killed it."""
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def serve(anew: bool = False) -> None:
    """Start the server from which processes are forked; it finds modules as this process does.

    What they print goes where this process's output went when the server started; hence `anew`.
    """
    if anew:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
    CONTEXT.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def _work(work: Callable[..., None], arguments: tuple[Any, ...], fail: str) -> None:
    failpoints.arm(fail)
    work(*arguments)
