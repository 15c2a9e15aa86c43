"""Two runs that want one policy at the same time: one trains it, the other waits."""

import logging
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forks import KILLED, begin, ended

from pipeline.plan import Plan
from pipeline.stages import train
from pipeline.store import Store
from pipeline.training import objective, policy
from training.run.runs import (
    FULL,
    Desk,
    checkpoints,
    left_over,
    require_same,
    train_until_killed,
)


class TrainedTwice(Exception):
    pass


def refuse(*_: Any) -> None:
    raise TrainedTwice


@contextmanager
def unlocked(*_: Any, **__: Any) -> Any:
    yield


@pytest.fixture
def desk(write_plan: Any, tmp_path: Path) -> Desk:
    return Desk(write_plan, tmp_path, training={**FULL, "epochs": 30})


def begun(desk: Desk, delay: float = 0) -> tuple[Any, Plan, Store]:
    """A training in a process of its own, after its first checkpoint."""
    plan, store = desk.copy()
    process = begin(train_until_killed, desk.path, store.root, delay)
    deadline = time.monotonic() + 120
    while not checkpoints(store):
        assert process.is_alive(), process.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process, plan, store


def test_the_second_waits_and_finds_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process, plan, store = begun(desk)
    monkeypatch.setattr(policy, "train", refuse)
    with monkeypatch.context() as control:
        control.setattr(objective, "locked", unlocked)
        with pytest.raises(TrainedTwice):
            train(plan, store, "dpo")
    assert process.is_alive()
    with caplog.at_level(logging.WARNING):
        result = train(plan, store, "dpo")
    assert "objective 'dpo': waiting for another run, which trains its policy" in caplog.messages
    assert ended(process) == 0
    assert not result.trained
    assert left_over(store) == []


def test_the_second_goes_on_when_the_first_is_killed(desk: Desk) -> None:
    undisturbed = desk.trained()
    process, plan, store = begun(desk, delay=0.5)
    result = train(plan, store, "dpo")
    assert ended(process) == KILLED
    assert result.trained
    require_same(result, undisturbed)
    assert left_over(store) == []
