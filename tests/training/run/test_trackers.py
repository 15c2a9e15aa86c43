"""Experiment trackers: the numbers arrive, and one that is missing is named."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

from pipeline.errors import TrainingError
from pipeline.stages import train
from training.run.runs import STEPS, Desk, require_same

SECTION = {**STEPS, "max_steps": 4, "evaluate_every": 2}


class Kept(tracking.GeneralTracker):  # type: ignore[misc]
    """Remembers what it is told."""

    name = "tensorboard"
    requires_logging_directory = True
    told: ClassVar[list[tuple[int, dict[str, float]]]] = []
    events: ClassVar[list[str]] = []
    fails = False

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__()
        self.events.append(f"{logging_dir}/{run_name}")

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        raise NotImplementedError

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.fails and step == 3:
            raise RuntimeError("no route to host")
        assert step is not None
        self.told.append((step, values))

    def finish(self) -> None:
        self.events.append("finished")


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    """accelerate's own list has the stub under TensorBoard's name."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    if LoggerType.TENSORBOARD not in tracking.get_available_trackers():
        monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    Kept.told, Kept.events, Kept.fails = [], [], False
    return Kept


def test_the_numbers_arrive(write_plan: Any, tmp_path: Path, tensorboard: type[Kept]) -> None:
    desk = Desk(write_plan, tmp_path, training=SECTION)
    plan, store = desk.copy("training.log_to=[tensorboard]")
    result = train(plan, store, "dpo")
    where, finished = tensorboard.events
    assert finished == "finished"
    assert where.startswith(str(store.directory / "tensorboard" / f"dpo-{result.policy_id}"))
    steps = {step: told for step, told in tensorboard.told if "loss" in told}
    assert list(steps) == [1, 2, 3, 4]
    for row in result.steps.rows(named=True):
        expected = {k: v for k, v in row.items() if k not in ("policy_id", "step", "kl")}
        assert steps[row["step"]] == expected
    evaluations = {step: told for step, told in tensorboard.told if "eval_loss" in told}
    for row in result.evaluations.rows(named=True):
        expected = {k: v for k, v in row.items() if k not in ("policy_id", "step")}
        assert evaluations[row["step"]] == expected
    assert len(tensorboard.told) == 4 + 3
    require_same(desk.trained(), result)
    assert len(tensorboard.told) == 4 + 3, "not asked for, nothing is told"


def test_a_tracker_that_fails_is_named(
    write_plan: Any, tmp_path: Path, tensorboard: type[Kept]
) -> None:
    desk = Desk(write_plan, tmp_path, training=SECTION)
    tensorboard.fails = True
    with pytest.raises(TrainingError, match=r"^step 3: training\.log_to: no route to host$"):
        desk.trained("training.log_to=[tensorboard]")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_is_missing_is_named(
    write_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    desk = Desk(write_plan, tmp_path, training=SECTION)
    said = rf"^before step 1: training\.log_to: the package {name} is not installed"
    with pytest.raises(TrainingError, match=said):
        desk.trained(f"training.log_to=[{name}]")
