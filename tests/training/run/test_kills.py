"""Killed in the middle of training and run again: weights and tables of an undisturbed training."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import KILLED, begin, ended
from safetensors.torch import load_file
from support import measured

from pipeline.failpoints import POINTS
from pipeline.plan import Plan
from pipeline.stages import train
from pipeline.store import Store
from pipeline.training.policy import PolicyResult
from pipeline.training.run import checkpoints as module
from pipeline.training.run import loop
from training.run.runs import (
    FULL,
    KINDS,
    LORA,
    STEPS,
    Desk,
    checkpoints,
    left_over,
    require_same,
    train_until_killed,
    weights_of,
)


def stand_of(store: Store) -> int | None:
    """The step of the newest checkpoint."""
    found = checkpoints(store)
    return int(found[-1].name.removeprefix("step-")) if found else None


def timed(plan: Plan, store: Store) -> tuple[PolicyResult, float]:
    """Train, and the seconds it took from the first step on."""
    began: list[float] = []
    real = loop.Run.step

    def step(*arguments: Any) -> float:
        began.append(time.monotonic())
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Run, "step", step)
        result = train(plan, store, "dpo")
    return result, time.monotonic() - began[0]


def killed_at_random(write_plan: Any, tmp_path: Path, n: int, seed: int) -> None:
    generator = random.Random(seed)
    stands: list[int | None] = []
    for i, (kind, training) in enumerate(KINDS.items()):
        root = tmp_path / kind
        desk = Desk(write_plan, root, training=training)
        plan, store = desk.copy()
        undisturbed, whole = timed(plan, store)
        assert undisturbed.steps.height >= 10
        for crash in range(i, n, len(KINDS)):
            plan, store = desk.copy()
            delay = generator.uniform(0, 1) * whole
            assert ended(begin(train_until_killed, desk.path, store.root, delay)) == KILLED
            stands.append(stand_of(store))
            said = f"{kind}: seed {seed}, crash {crash}, after step {stands[-1]}"
            require_same(train(plan, store, "dpo"), undisturbed, said)
            assert left_over(store) == [], said
    measured(f"killed at {n} random moments, newest checkpoints then: {stands}")
    assert sum(stand is not None for stand in stands) >= n / 3, "most came too early or too late"


def test_killed_at_a_random_moment(write_plan: Any, tmp_path: Path) -> None:
    killed_at_random(write_plan, tmp_path, 2, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_twenty_random_moments(write_plan: Any, tmp_path: Path) -> None:
    killed_at_random(write_plan, tmp_path, 20, seed=7)


def killed_at(desk: Desk, fault: str, stand: int | None) -> None:
    undisturbed = desk.trained()
    plan, store = desk.copy()
    process = begin(train_until_killed, desk.path, store.root, 0.0, fail=fault)
    assert ended(process) == KILLED, f"{fault} was not come to"
    assert stand_of(store) == stand
    require_same(train(plan, store, "dpo"), undisturbed, fault)
    assert left_over(store) == [], fault


def test_killed_while_a_checkpoint_is_written(write_plan: Any, tmp_path: Path) -> None:
    """With evaluations the one of step 0 is the first."""
    killed_at(Desk(write_plan, tmp_path, training=LORA), "checkpoint.written:kill@4", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "stand"),
    [
        ("checkpoint.begun:kill@2", 2),
        ("checkpoint.written:kill@2", 2),
        ("checkpoint.published:kill@2", 4),
        ("policy.begun:kill", 10),
        ("policy.written:kill", 10),
    ],
)
def test_killed_at_every_point(write_plan: Any, tmp_path: Path, fault: str, stand: int) -> None:
    desk = Desk(write_plan, tmp_path, training={**FULL, "max_steps": 11})
    assert fault.partition(":")[0] in POINTS
    killed_at(desk, fault, stand)


def test_killed_before_its_checkpoints_are_removed(write_plan: Any, tmp_path: Path) -> None:
    """The policy is there; the next run that wants it clears up."""
    killed_at(Desk(write_plan, tmp_path, training=FULL), "policy.published:kill", 10)


def stopped(desk: Desk, after: int) -> tuple[Any, Store]:
    """A training that an exception ends after so many steps, as a kill would."""
    plan, store = desk.copy()

    class Stop(BaseException):
        pass

    real = loop.Run.step

    def step(run: loop.Run, *arguments: Any) -> float:
        if run._standing.step == after:
            raise Stop
        return real(run, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Run, "step", step)
        with pytest.raises(Stop):
            train(plan, store, "dpo")
    return plan, store


@pytest.mark.parametrize("kind", ["full", pytest.param("lora, evaluated", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_passed_over(write_plan: Any, tmp_path: Path, kind: str) -> None:
    desk = Desk(write_plan, tmp_path, training=KINDS[kind])
    undisturbed = desk.trained()
    damages: dict[str, Callable[[Path], object]] = {
        "trained.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
        "optimiser.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "random.safetensors": lambda path: path.unlink(),
        "state.json": lambda path: path.write_text(path.read_text()[:-5]),
    }
    for name, damage in damages.items():
        plan, store = stopped(desk, 8)
        newest = checkpoints(store)[-1]
        damage(newest / name)
        require_same(train(plan, store, "dpo"), undisturbed, name)
    # All of them: from the beginning.
    plan, store = stopped(desk, 8)
    for directory in checkpoints(store):
        (directory / "state.json").write_text("{}")
    require_same(train(plan, store, "dpo"), undisturbed)


def test_moments_are_put_back(write_plan: Any, tmp_path: Path) -> None:
    """Without them the weights are others: the test above would see it."""
    desk = Desk(write_plan, tmp_path, training=FULL)
    undisturbed = desk.trained()
    plan, store = stopped(desk, 8)
    real = module.load_checkpoint

    def without(folder: Path, parameters: Any, optimiser: Any) -> Any:
        standing = real(folder, parameters, optimiser)
        assert standing is not None
        optimiser.state.clear()
        return standing

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "load_checkpoint", without)
        forgetful = train(plan, store, "dpo")
    assert weights_of(forgetful) != weights_of(undisturbed)
    require_same(train(*stopped(desk, 8), "dpo"), undisturbed)


def test_checkpoints_are_few_whole_and_not_pickled(write_plan: Any, tmp_path: Path) -> None:
    """The last two and the best, which is the start's here; moments as AdamW has them."""
    training = {**LORA, "max_steps": 9, "best_metric": "eval_rewards/rejected"}
    desk = Desk(write_plan, tmp_path, training=training)
    plan, store = desk.copy()
    seen: list[list[str]] = []

    def look(point: str) -> None:
        seen.append([path.name for path in checkpoints(store)])
        for file in store.policies.rglob("*.*"):
            assert file.suffix in {"", ".json", ".safetensors", ".tmp"}, file
            if file.is_file():
                assert not file.read_bytes().startswith((b"\x80", b"PK")), "a pickle, or a zip"

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "reach", look)
        result = train(plan, store, "dpo")
    assert result.kept == 0
    assert max(len(names) for names in seen) == 4, "for a moment the new one, too"
    assert all("step-00000000" in names for names in seen[3:])
    assert left_over(store) == []
    assert {file.suffix for file in result.directory.iterdir()} <= {
        *(".json", ".safetensors", ".parquet", ".jinja"),
    }
    # What a checkpoint has.
    plan, store = stopped(Desk(write_plan, tmp_path / "two", training=STEPS), 5)
    names = [path.name for path in checkpoints(store)]
    assert names == ["step-00000004", "step-00000005"]
    newest = checkpoints(store)[-1]
    trained, moments = (load_file(newest / f"{n}.safetensors") for n in ("trained", "optimiser"))
    assert {key.partition(":")[2] for key in moments} == set(trained)
    for name, value in trained.items():
        assert float(moments[f"step:{name}"]) == 5
        assert moments[f"exp_avg:{name}"].shape == value.shape
    assert all(torch.isfinite(value).all() for value in moments.values())
    state = json.loads((newest / "state.json").read_text())
    assert state["standing"]["step"] == len(state["standing"]["rows"]) == 5
