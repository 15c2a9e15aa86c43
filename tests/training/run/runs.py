"""Trainings of a tiny model that are stopped, broken, and compared to the bit."""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

from support import prepared

from pipeline.names import store_of
from pipeline.plan import Plan, load_plan
from pipeline.stages import train
from pipeline.store import Store, file_digest
from pipeline.training.policy import PolicyResult
from pipeline.training.run import loop

STEPS = {
    "epochs": 4,
    "batch_pairs": 3,
    "learning_rate": 5e-3,
    "checkpoint_every": 1,
    "threads": 1,
}
"""Twelve steps or so, as `training` of a plan."""

LORA = {**STEPS, "evaluate_every": 2, "keep_best": True}
FULL = {**STEPS, "method": "full", "checkpoint_every": 2, "learning_rate": 1e-3}
KINDS = {"lora, evaluated": LORA, "full": FULL}


class Desk:
    """A plan whose models are scored, and copies of its store to train in."""

    def __init__(self, write_plan: Any, root: Path, **sections: Any) -> None:
        self.path, self._root, self._n = write_plan(**sections), root, 0
        self.plan, self.store = prepared(self.path)

    def copy(self, *overrides: str) -> tuple[Plan, Store]:
        """The plan over a store of its own, in which nothing is trained yet."""
        self._n += 1
        root = self._root / f"copy{self._n}"
        shutil.copytree(self.store.root, root, symlinks=True)
        plan = load_plan(self.path, [f"store={root}", *overrides])
        return plan, store_of(plan)

    def trained(self, *overrides: str, objective: str = "dpo") -> PolicyResult:
        """Trained in a store of its own."""
        return train(*self.copy(*overrides), objective)


def weights_of(result: PolicyResult) -> dict[str, str]:
    return {file.name: file_digest(file) for file in result.directory.glob("*.safetensors")}


def require_same(one: PolicyResult, other: PolicyResult, said: str = "") -> None:
    """The same weights and tables, to the bit."""
    assert one.policy_id == other.policy_id, said
    assert weights_of(one) == weights_of(other), said
    assert one.steps.equals(other.steps), said
    assert one.evaluations.equals(other.evaluations), said
    assert (one.first_step, one.kept) == (other.first_step, other.kept), said


def checkpoints(store: Store) -> list[Path]:
    """All there are, the newest last."""
    return sorted(store.policies.glob(".checkpoints/*/step-*"))


def left_over(store: Store) -> list[str]:
    """What is in the policies' folder beside policies, and locks of what is not trained."""
    inside = store.policies.rglob(".*")
    return sorted(str(path.relative_to(store.policies)) for path in inside if any_file(path))


def any_file(path: Path) -> bool:
    inside = [path, *path.rglob("*")]
    return any(file.is_file() and file.name != "lock" for file in inside)


def train_until_killed(path: Path, root: Path, delay: float) -> None:
    """Train; killed so many seconds after the first step began, if not 0."""
    plan, step = load_plan(path, [f"store={root}"]), loop.Run.step
    clock = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))

    def step_until_killed(run: loop.Run, *arguments: Any) -> float:
        if delay and not clock.is_alive():
            clock.start()
        return step(run, *arguments)

    loop.Run.step = step_until_killed  # type: ignore[assignment,method-assign]
    train(plan, store_of(plan), "dpo")
