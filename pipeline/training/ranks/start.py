"""Starting the processes of `training.processes` and waiting for them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.errors import TrainingError
from pipeline.plan import Plan
from pipeline.training.ranks.errors import cause_of
from pipeline.training.run.checkpoints import newest_step

RANK = "pipeline.training.ranks.rank"
"""The module every process runs."""

_END_SECONDS = 40.0
"""torchrun gives its processes 30 seconds to end by themselves."""


def train_in_processes(
    plan: Plan, name: str, policy_id: str, checkpoints: Path, module: str = RANK
) -> None:
    """Train an objective's policy by torchrun; once this returns, the policy is in the store.

    The processes end with this one, however it ends. Each has its share of the cores.

    Args:
        plan: with `training.processes` > 1.
        name: the objective.
        policy_id: what the processes must come to as well.
        checkpoints: where training stands, for the message.
        module: what every process runs, with a folder as its argument.

    Raises:
        LogratioError: as the process that failed first raised it, a `TrainingError` if it did not
            come to that (it was killed, or it is a fault of ours); the last checkpoint is intact.
    """
    n = plan.training.processes
    _require_devices(n)
    asked = {"plan": plan.model_dump(mode="json"), "objective": name, "policy_id": policy_id}
    with tempfile.TemporaryDirectory(prefix="logratio-ranks-") as folder:
        Path(folder, "asked.json").write_text(json.dumps(asked))
        launcher = subprocess.Popen(
            [sys.executable, "-m", "pipeline.training.ranks.launch", folder, str(n), module],
            env=_environment(n),
            stdin=subprocess.PIPE,  # its end tells all of them that this process is gone
            stdout=2,
            start_new_session=True,  # an interrupt is for this process, which then ends them
        )
        try:
            status = launcher.wait()
        finally:
            assert launcher.stdin is not None
            launcher.stdin.close()
            _end(launcher)
        if status == 0:
            return
        raise cause_of(Path(folder), n, _standing(checkpoints))


def _standing(checkpoints: Path) -> str:
    step = newest_step(checkpoints)
    return "before the first checkpoint" if step is None else f"after the checkpoint of step {step}"


def _require_devices(n: int) -> None:
    """Refuse more processes than GPUs, where there are any.

    Raises:
        TrainingError: says how many there are.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else n
    if n > found:
        raise TrainingError(
            f"before step 1: training.processes: {n} processes need a GPU each, and {found} "
            "are visible"
        )


def _environment(n: int) -> dict[str, str]:
    """This process's, with the code it runs, and its cores divided among n."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(said) if said.isdigit() else len(os.sched_getaffinity(0))
    threads = str(max(1, cores // n))
    changed = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if sys.platform == "linux":
        changed |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    return {**os.environ, **changed}


def _end(launcher: "subprocess.Popen[bytes]") -> None:
    """Wait for torchrun, whose processes have ended or are about to."""
    try:
        launcher.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()
