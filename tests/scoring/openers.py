"""Engines that workers in other processes can open: each leaves notes of what befell it.

A model's "checkpoint" is the directory of the notes. torch is not loaded by importing this.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fake_engine import FakeEngine

from pipeline.errors import ModelError, ScoringError
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig
from pipeline.scoring.engines.base import Engine, EngineDied, Group
from pipeline.scoring.workers import Report


def note(directory: Path, what: str, *said: object) -> None:
    """Leave a note of this process; a line is written in one piece."""
    with (directory / what).open("a") as file:
        file.write(" ".join(str(part) for part in (os.getpid(), *said)) + "\n")


def notes(directory: Path, what: str) -> list[list[str]]:
    """The notes, each a process id and what it said."""
    path = directory / what
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def processes(directory: Path, what: str) -> list[int]:
    """Who left such a note, once per note."""
    return [int(words[0]) for words in notes(directory, what)]


def first_time(directory: Path, what: str) -> bool:
    """True for the first of all processes that asks."""
    try:
        (directory / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class NotingEngine(FakeEngine):
    """A fake engine that notes its opening, its calls and its end."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        places = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        note(directory, "opened", *(os.environ.get(name, "-") for name in places))

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        note(self.directory, "scored", *(c.sequence_id for g in groups for c in g.completions))
        return super().score(groups, batch_tokens)

    def close(self) -> None:
        note(self.directory, "closed")


def names(groups: Sequence[Group]) -> list[str]:
    """Sequences of some groups."""
    return [c.sequence_id for group in groups for c in group.completions]


def open_noting(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """An engine with which nothing goes wrong."""
    return NotingEngine(checkpoint.path)


def open_fake(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """The same without notes."""
    return FakeEngine()


def open_with_a_process(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """An engine that works in a process of its own, as vLLM on a GPU, and does not end it."""
    core = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    core.start()
    note(checkpoint.path, "core", core.pid)
    return NotingEngine(checkpoint.path)


class FaultyEngine(NotingEngine):
    """Meets the fate that `config.checkpoint` names, over the sequence that it names.

    `killed once:<sequence>` and so on; the first word is the fate, the second how often.
    """

    def __init__(self, directory: Path, fate: str) -> None:
        super().__init__(directory)
        said, self.victim = fate.split(":")
        self.fate, self.often = said.split()

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        if self.victim in names(groups) and (
            self.often == "always" or first_time(self.directory, "met")
        ):
            note(self.directory, self.fate)
            if self.fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fate == "died":
                raise EngineDied(f"died on sequences {self.victim}")
            raise ScoringError(f"sequence {self.victim}: a log-prob is above 0")
        return super().score(groups, batch_tokens)


def open_faulty(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """See `FaultyEngine`."""
    return FaultyEngine(checkpoint.path, config.checkpoint)


class DyingEngine(NotingEngine):
    """Dies of everything."""

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        note(self.directory, "died")
        raise EngineDied("as always")


def open_dying(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """See `DyingEngine`."""
    return DyingEngine(checkpoint.path)


def open_never(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """A model that cannot be loaded."""
    raise ModelError("checkpoint nowhere: cannot be loaded")


def open_torch(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """The torch engine, which notes what it found."""
    had_torch = "torch" in sys.modules
    from pipeline.scoring.engines.torch_engine import TorchEngine

    engine = TorchEngine(config, checkpoint, longest)
    import torch

    note(checkpoint.path, "torch", had_torch, torch.get_num_threads())
    return engine


def square(engine: Engine, item: int, report: Report | None) -> tuple[int, int]:
    """A task that needs no engine: who did it, and a result."""
    return os.getpid(), item**2


def die(engine: Engine, item: int, report: Report | None) -> None:
    """A task that every engine dies of."""
    raise EngineDied("always")


def whereabouts(engine: Engine, item: float, report: Report | None) -> dict[str, Any]:
    """A task that takes `item` seconds and tells of its process."""
    time.sleep(item)
    return {"pid": os.getpid(), "environment": dict(os.environ)}


def kill_worker_once(engine: Engine, item: Path, report: Report | None) -> int:
    """A task that kills its process, if it is the first to see `item`'s directory."""
    if first_time(item, "killed once"):
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()
