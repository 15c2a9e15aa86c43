"""Trainings of a tiny model that are stopped, broken, and compared to the bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import prepared

from pipeline.names import store_of
from pipeline.plan import Plan, load_plan
from pipeline.stages import train
from pipeline.store import Store, file_digest
from pipeline.training.policy import PolicyResult

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


_KILLED = """
import os, signal, sys, threading
from pathlib import Path
from pipeline import stages
from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.training.run import loop

plan, delay, step = load_plan(Path(sys.argv[1]), sys.argv[3:]), float(sys.argv[2]), loop.Run.step
clock = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))

def step_until_killed(*arguments):
    if delay and not clock.is_alive():
        clock.start()
    return step(*arguments)

loop.Run.step = step_until_killed
stages.train(plan, store_of(plan), "dpo")
"""


def begin(path: Path, store: Store, delay: float = 0, fail: str = "") -> "subprocess.Popen[str]":
    """Train in a process of its own, killed so long after its first step began, or at a point."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "LOGRATIO_FAIL": fail}
    return subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path), str(delay), f"store={store.root}"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> int:
    _, said = process.communicate(timeout=300)
    assert process.returncode in (0, -9), said
    return process.returncode
