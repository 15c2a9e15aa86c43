"""Two processes, by torchrun, on a CPU: what one would have trained, and how they fail."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import PROJECT, measured

from pipeline import errors
from pipeline.errors import ModelError, TrainingError
from pipeline.plan import Plan, load_plan
from pipeline.stages import train
from pipeline.training import objective
from pipeline.training.data.schedule import step_ids
from pipeline.training.policy import PolicyResult
from pipeline.training.ranks.errors import cause_of, write_ended, write_error
from pipeline.training.ranks.launch import redirects
from pipeline.training.ranks.start import _environment, train_in_processes
from training.run.runs import Desk, checkpoints, left_over, weights_of

FULL = {
    "method": "full",
    "epochs": 3,
    "batch_pairs": 4,
    "learning_rate": 1e-3,
    "max_grad_norm": 100.0,  # the size of a gradient is seen
    "checkpoint_every": 2,
    "evaluate_every": 4,
    "token_statistics": True,
}
LOSSES: dict[str, dict[str, Any]] = {"dpo": {"beta": 0.1}, "kto": {"beta": 0.1}, "aot": {}}
OBJECTIVES = {
    name: {"loss": name, "reference": "base", "start": "base", **values}
    for name, values in LOSSES.items()
}


@pytest.fixture
def desk(write_plan: Any, tmp_path: Path) -> Desk:
    return Desk(write_plan, tmp_path, training=FULL, objectives=OBJECTIVES)


def updates(desk: Desk, result: PolicyResult) -> torch.Tensor:
    start = load_file(Path(desk.plan.models["base"].checkpoint) / "model.safetensors")
    after = load_file(result.directory / "model.safetensors")
    return torch.cat([(after[name] - start[name]).double().flatten() for name in start])


def relative(desk: Desk, one: PolicyResult, two: PolicyResult) -> float:
    expected = updates(desk, one)
    return float((updates(desk, two) - expected).norm() / expected.norm())


TWO = "training.processes=2"


def by(module: str, monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Let the processes run other code first, as a module of that name."""
    text = f"{code}\nif __name__ == '__main__':\n    main(Path(sys.argv[1]))\n"
    imports = "import os, signal, sys, time\nfrom pathlib import Path\n"
    imports += "from pipeline.errors import TrainingError\n"
    imports += "from pipeline.training.ranks.rank import main\n"
    imports += "from pipeline.training.run import loop\n"
    imports += "from pipeline.training.run.devices import Devices\n"
    imports += "RANK = int(os.environ.get('RANK', 0))\n"
    (folder / f"{module}.py").write_text(imports + text)
    monkeypatch.syspath_prepend(folder)
    started = partial(train_in_processes, module=module)
    monkeypatch.setattr(objective, "train_in_processes", started)


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "aot"))]
)
def test_two_processes_train_what_one_does(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plan, store = desk.copy()
    one = train(plan, store, name)
    assert 1 in {len(step) for step in step_ids({str(i): 1 for i in range(9)}, plan.training)}
    plan, store = desk.copy(TWO)
    two = train(plan, store, name)
    assert two.trained
    assert two.policy_id == one.policy_id, "the number of processes decides nothing"
    assert not train(plan, store, name).trained
    assert left_over(store) == []
    off = relative(desk, one, two)
    logged = one.steps.drop("policy_id", strict=False).fill_null(0.0) - two.steps.drop(
        "policy_id", strict=False
    ).fill_null(0.0)
    loss = float(logged["loss"].abs().max())  # type: ignore[arg-type]
    worst = max(float(column.abs().max()) for column in logged)  # type: ignore[arg-type]
    by("lone", monkeypatch, tmp_path, "Devices.sum_gradients = lambda self, parameters: None")
    lone = relative(desk, one, desk.trained(TWO, objective=name))
    measured(
        f"{name}: two processes off by {off:.1e} of the update, losses by {loss:.1e}, "
        f"all that is logged by {worst:.1e}; "
        f"gradients not added (control) {lone:.2f}"
    )
    assert off <= 2e-3
    assert loss <= 1e-5
    assert worst <= 1e-3
    assert (two.steps["entropy"] > 0).all()
    assert one.evaluations["step"].equals(two.evaluations["step"])
    assert (one.evaluations["eval_loss"] - two.evaluations["eval_loss"]).abs().max() < 1e-5  # type: ignore[operator]
    assert lone > 2e-3


AT_STEP = """
real = loop.Run.step
def step(run, *arguments):
    if RANK == {rank} and run._standing.step == {step}:
        {action}
    return real(run, *arguments)
loop.Run.step = step
"""


@pytest.mark.parametrize(
    ("rank", "action", "said"),
    [
        (1, "raise TrainingError('step 4: loss is nan')", "step 4: loss is nan"),
        (
            1,
            "os.kill(os.getpid(), signal.SIGKILL)",
            "process 1 of 2 was ended by SIGKILL, after the checkpoint of step 2",
        ),
        pytest.param(
            0,
            "os.kill(os.getpid(), signal.SIGKILL)",
            "process 0 of 2 was ended by SIGKILL, after the checkpoint of step 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0,
            "raise ValueError('what is this?')",
            "process 0 of 2, after the checkpoint of step 2: ValueError: what is this?",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["typed", "killed", "first-killed", "untyped"],
)
def test_one_process_fails(
    desk: Desk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: int,
    action: str,
    said: str,
) -> None:
    plan, store = desk.copy(TWO)
    with monkeypatch.context() as patched:
        by("failing", patched, tmp_path, AT_STEP.format(rank=rank, step=3, action=action))
        with pytest.raises(TrainingError) as caught:
            train(plan, store, "dpo")
    assert str(caught.value) == said
    heard = capfd.readouterr().err
    assert "Traceback" not in heard
    assert "exitcode" not in heard
    assert checkpoints(store)[-1].name == "step-00000002"
    # One process can go on with what two began.
    one = plan.training.model_copy(update={"processes": 1})
    resumed = train(plan.model_copy(update={"training": one}), store, "dpo")
    assert relative(desk, desk.trained(), resumed) <= 2e-3
    assert left_over(store) == []


@pytest.mark.slow
def test_what_is_wrong_before_the_first_step(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match=r"^before step 1: no adapter can be put on .*nope"):
        desk.trained(TWO, "training.method=lora", "training.lora.target_modules=[nope]")
    # They do not see the same checkpoints.
    code = "if RANK == 1:\n    loop.load_checkpoint = lambda *_: None\n"
    plan, store = desk.copy(TWO)
    with monkeypatch.context() as patched:
        by("ends", patched, tmp_path, AT_STEP.format(rank=0, step=3, action="os._exit(3)"))
        with pytest.raises(TrainingError, match=r"^process 0 of 2 ended with status 3, after"):
            train(plan, store, "dpo")
    with monkeypatch.context() as patched:
        by("blind", patched, tmp_path, code)
        said = r"do not agree on the checkpoint .* \(process 0: 2, process 1: None\)"
        with pytest.raises(TrainingError, match=said):
            train(plan, store, "dpo")
    # The tables were published anew meanwhile.
    with pytest.raises(TrainingError, match=r"^before step 1: objective 'dpo' is policy "):
        train_in_processes(plan, "dpo", "0" * 32, tmp_path)


def running(folder: Path) -> list[str]:
    """Command lines of processes that name a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(folder) in said and state != "Z":
            found.append(said)
    return found


@pytest.mark.slow
def test_the_processes_end_with_the_one_that_asked(desk: Desk, tmp_path: Path) -> None:
    _, store = desk.copy()
    folder = tmp_path / "here"
    folder.mkdir()
    script = (
        "import sys; from pathlib import Path; from pipeline.names import store_of\n"
        "from pipeline.plan import load_plan; from pipeline.stages import train\n"
        "plan = load_plan(Path(sys.argv[1]), sys.argv[2:]); train(plan, store_of(plan), 'dpo')"
    )
    overrides = [TWO, f"store={store.root}", "training.epochs=5000"]
    asker = subprocess.Popen(
        [sys.executable, "-c", script, str(desk.path), *overrides],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not checkpoints(store):
        assert time.monotonic() < deadline
        assert asker.poll() is None
        time.sleep(0.05)
    assert len(running(folder)) == 3, "torchrun and two"
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    deadline = time.monotonic() + 40
    while running(folder):
        assert time.monotonic() < deadline, running(folder)
        time.sleep(0.05)


def test_which_of_several_errors_is_the_cause(tmp_path: Path) -> None:
    lost = RuntimeError("Connection closed by peer")
    write_error(tmp_path, 0, lost)
    write_error(tmp_path, 2, lost)
    assert str(cause_of(tmp_path, 3, "here")).startswith("process 0 of 3, here: RuntimeError: Conn")
    write_ended(tmp_path, {0: 1, 2: -15})
    assert str(cause_of(tmp_path, 3, "here")).startswith("process 0 of 3, here: RuntimeError: Conn")
    write_ended(tmp_path, {0: 1, 1: 3})
    assert str(cause_of(tmp_path, 3, "here")) == "process 1 of 3 ended with status 3, here"
    write_ended(tmp_path, {0: 1, 1: -11, 2: -15})
    found = cause_of(tmp_path, 3, "here")
    assert (type(found), str(found)) == (
        TrainingError,
        "process 1 of 3 was ended by SIGSEGV, here",
    )
    write_error(tmp_path, 1, ModelError("checkpoint x: cannot be loaded"))
    found = cause_of(tmp_path, 3, "here")
    assert (type(found), str(found)) == (ModelError, "checkpoint x: cannot be loaded")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "none said why" in str(cause_of(nothing, 2, "here"))
    assert errors.TrainingError is TrainingError


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, n, each in (("8", 2, "4"), ("1", 2, "1"), ("3", 2, "1")):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert _environment(n)["OMP_NUM_THREADS"] == each
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _environment(1)["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("n", [1, 2, 10, 11, 64])
def test_torchrun_takes_any_number_of_processes(n: int, tmp_path: Path) -> None:
    from torch.distributed.run import config_from_args, parse_args

    given = ["--nproc-per-node", str(n), "--log-dir", str(tmp_path), *redirects(n), "-m", "module"]
    config, _, _ = config_from_args(parse_args(given))  # type: ignore[no-untyped-call]
    envs = {rank: {"RANK": str(rank)} for rank in range(n)}
    assert config.logs_specs is not None
    to = config.logs_specs.reify(envs)
    silent = [rank for rank in range(n) if to.stderrs[rank]]
    assert silent == list(range(0 if n > 10 else 1, n))


def test_a_plan_travels_as_json() -> None:
    for path in sorted((PROJECT / "plans").rglob("*.yaml")):
        plan = load_plan(path)
        said = plan.model_dump(mode="json")
        again = Plan.model_validate(json.loads(json.dumps(said)))
        assert again.model_dump(mode="json") == said, path


@pytest.mark.slow
def test_two_runs_of_two_processes_are_bit_equal(desk: Desk) -> None:
    plan, store = desk.copy(TWO)
    one, two = train(plan, store, "dpo"), desk.trained(TWO)
    assert weights_of(one) == weights_of(two)
