"""What goes wrong in training: a typed error with step and cause, and the last checkpoint stays."""

import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring.oracle import build_adapter
from support import build_tiny_model, measured, prepared, tokenized

from pipeline import failpoints
from pipeline.errors import ModelError, ScoringError, TrainingError
from pipeline.plan import ModelConfig, load_plan
from pipeline.stages import score, train
from pipeline.training import objective
from pipeline.training.run import loop
from pipeline.training.run.replicas import Replicas
from pipeline.training.run.step import StepResult, run_step
from training.run.runs import FULL, LORA, STEPS, Desk, checkpoints, left_over, require_same

Poison = Callable[[Replicas, StepResult], StepResult]


def gradient(value: float) -> Poison:
    def poison(replicas: Replicas, result: StepResult) -> StepResult:
        of_last = replicas.parameters[-1].grad
        assert of_last is not None
        of_last.view(-1)[0] = value
        return result

    return poison


def loss(value: float) -> Poison:
    return lambda _, result: replace(result, seen=[{**result.seen[0], "loss": value}] * 3)


@contextmanager
def poisoned(step: int, poison: Poison) -> Iterator[None]:
    """One step of those inside the block is not what it was computed to be."""

    def poisoned_step(replicas: Any, work: Any, *arguments: Any, **named: Any) -> StepResult:
        result = run_step(replicas, work, *arguments, **named)
        return poison(replicas, result) if work.number == step else result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "run_step", poisoned_step)
        yield


@pytest.mark.parametrize(
    "training",
    [pytest.param(LORA, id="lora", marks=pytest.mark.slow), pytest.param(FULL, id="full")],
)
def test_a_number_that_is_not_finite(write_plan: Any, tmp_path: Path, training: Any) -> None:
    desk = Desk(write_plan, tmp_path, training=training)
    undisturbed = desk.trained()
    faults = {
        "loss is nan": loss(float("nan")),
        "loss is inf": loss(float("inf")),
        "grad_norm is nan": gradient(float("nan")),
        "grad_norm is inf": gradient(float("inf")),
        # Finite, and its square is not: the norm overflows.
        r"grad_norm is inf ": gradient(3e38),
    }
    for said, poison in faults.items():
        plan, store = desk.copy()
        with poisoned(6, poison), pytest.raises(TrainingError) as caught:
            train(plan, store, "dpo")
        assert str(caught.value) == f"step 6: {said.strip()}"
        every = training["checkpoint_every"]
        assert checkpoints(store)[-1].name == f"step-{5 // every * every:08}"
        require_same(train(plan, store, "dpo"), undisturbed, said)
        assert left_over(store) == []


def test_what_does_not_fit_says_what_would(write_plan: Any, tmp_path: Path) -> None:
    desk = Desk(write_plan, tmp_path, training=LORA)
    undisturbed = desk.trained()

    def too_much(replicas: Replicas, result: StepResult) -> StepResult:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    plan, store = desk.copy()
    said = r"^step 6: out of memory .*micro_batch_tokens.*gradient_checkpointing.*2\.00 GiB"
    with poisoned(6, too_much), pytest.raises(TrainingError, match=said):
        train(plan, store, "dpo")
    assert checkpoints(store)[-1].name == "step-00000005"
    require_same(train(plan, store, "dpo"), undisturbed)


def test_a_gradient_explodes_of_itself(write_plan: Any, tmp_path: Path) -> None:
    """Step 0 is a tie, whose loss is log 2 whatever beta is; the gradient is beta times another."""
    objective = {"loss": "dpo", "beta": 1e39, "reference": "base", "start": "base"}
    desk = Desk(write_plan, tmp_path, training=STEPS, objectives={"dpo": objective})
    with pytest.raises(TrainingError, match=r"^step 1: grad_norm is (inf|nan)$"):
        desk.trained()


def test_an_update_that_leaves_no_finite_weights_is_not_kept(
    write_plan: Any, tmp_path: Path
) -> None:
    desk = Desk(write_plan, tmp_path, training={**FULL, "max_steps": 2, "warmup_share": 0.0})
    plan, store = desk.copy("training.learning_rate=1e39", "training.schedule=constant")
    said = r"^step \d: (its update left .* not finite|\w+ is nan)"
    with pytest.raises(TrainingError, match=said):
        train(plan, store, "dpo")
    assert checkpoints(store) == []
    assert not list(store.policies.glob("[!.]*"))


@pytest.fixture
def fail() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("checkpoint.begun:enospc@4", "step 4: no checkpoint in"),
        ("checkpoint.written:eio@4", "step 4: no checkpoint in"),
        ("policy.begun:enospc", "step 12: the policy cannot be written to"),
        ("policy.written:eio", "step 12: the policy cannot be written to"),
    ],
)
def test_a_disk_that_fails(
    write_plan: Any, tmp_path: Path, fail: None, fault: str, said: str
) -> None:
    desk = Desk(write_plan, tmp_path, training={**STEPS, "max_steps": 12})
    undisturbed = desk.trained()
    plan, store = desk.copy()
    failpoints.arm(fault)
    with pytest.raises(TrainingError) as caught:
        train(plan, store, "dpo")
    failpoints.arm("")
    assert str(caught.value).startswith(said)
    reason = "No space left on device" if "enospc" in fault else "Input/output error"
    assert reason in str(caught.value)
    assert str(store.policies) in str(caught.value)
    assert len(checkpoints(store)) == 2, "the last two are intact"
    require_same(train(plan, store, "dpo"), undisturbed, fault)
    assert left_over(store) == []


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Writing beyond this fails, with EFBIG where a full disk gives ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_cut_short(write_plan: Any, tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""
    desk = Desk(write_plan, tmp_path, training={**FULL, "max_steps": 4})
    plan, store = desk.copy()
    with largest_file(20_000), pytest.raises(TrainingError) as caught:
        train(plan, store, "dpo")
    assert str(caught.value).startswith("step 2: no checkpoint in")
    assert "File too large" in str(caught.value)
    plan, store = desk.copy("training.checkpoint_every=25")
    with largest_file(20_000), pytest.raises(TrainingError) as caught:
        train(plan, store, "dpo")
    assert str(caught.value).startswith("step 4: the policy cannot be written to")
    assert "File too large" in str(caught.value)
    assert left_over(store) == []


@pytest.mark.slow
def test_a_full_disk(write_plan: Any, tmp_path: Path) -> None:
    """On a real one, of fourteen sizes; needs root, hence slow."""
    desk = Desk(write_plan, tmp_path, training={**FULL, "max_steps": 6})
    undisturbed = desk.trained()
    stopped = []
    for n_kib in range(100, 2900, 200):
        plan, store = desk.copy()
        store.policies.mkdir(exist_ok=True)
        small = ["-t", "tmpfs", "-o", f"size={n_kib}k", "tmpfs", str(store.policies)]
        subprocess.run(["mount", *small], check=True)
        try:
            try:
                train(plan, store, "dpo")
            except TrainingError as error:
                said = str(error)
                stopped.append(said.partition(":")[0])
            else:
                said = f"No space left on device, {store.policies}"
            assert "No space left on device" in said
            assert str(store.policies) in said
            larger = ["-o", "remount,size=64m", str(store.policies)]
            subprocess.run(["mount", *larger], check=True)
            require_same(train(plan, store, "dpo"), undisturbed, f"{n_kib} KiB")
            assert left_over(store) == []
        finally:
            subprocess.run(["umount", "-l", str(store.policies)], check=True)
    measured(f"stopped by a full disk at {stopped}, of 14 sizes")
    assert len(set(stopped)) >= 3


def test_no_such_target(write_plan: Any) -> None:
    plan, store = prepared(write_plan(), "training.lora.target_modules=[nope]")
    with pytest.raises(TrainingError, match=r"^before step 1: no adapter can be put on .*nope"):
        train(plan, store, "dpo")
    assert checkpoints(store) == []


def test_another_vocabulary(write_plan: Any, tiny_model: Path, tmp_path: Path) -> None:
    """The start has fewer rows than the tokeniser has tokens; the reference has all."""
    small = build_tiny_model(tmp_path / "small", vocab_size=280)
    models = {"base": {"checkpoint": str(tiny_model)}, "small": {"checkpoint": str(small)}}
    objectives = {"dpo": {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "small"}}
    path = write_plan(models=models, objectives=objectives)
    plan, store = tokenized(path)
    score(plan, store, "base")
    said = r"^before step 1: token id \d+ is outside the vocabulary of 280 of .*small"
    with pytest.raises(TrainingError, match=said):
        train(plan, store, "dpo")
    # Nor does such a model get as far as being a reference.
    with pytest.raises(ScoringError, match="outside the vocabulary of 280"):
        score(plan, store, "small")
    turned = load_plan(path, ["objectives.dpo.reference=small", "objectives.dpo.start=base"])
    with pytest.raises(TrainingError, match="the reference has no log-prob of"):
        train(turned, store, "dpo")


def test_the_seed_of_torch_does_not_matter(write_plan: Any, tmp_path: Path) -> None:
    desk = Desk(write_plan, tmp_path, training={**STEPS, "max_steps": 2})
    one = desk.trained()
    torch.manual_seed(99)
    require_same(desk.trained(), one)


def test_an_adapter_that_could_not_be_scored_is_not_trained(
    write_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(write_plan, tmp_path, training={**STEPS, "max_steps": 1})
    asked: list[ModelConfig] = []

    def refuse(config: ModelConfig) -> None:
        asked.append(config)
        raise ModelError("bfloat16 and float16 only")

    monkeypatch.setattr(objective, "require_adapters", refuse)
    plan, store = desk.copy()
    with pytest.raises(ModelError, match="bfloat16 and float16 only"):
        train(plan, store, "dpo")
    assert asked == [plan.models["base"]]
    assert checkpoints(store) == []
    assert desk.trained("training.method=full").steps.height == 1


def test_no_adapter_is_trained_on_an_adapter(
    write_plan: Any, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = build_adapter(tiny_model, tmp_path / "adapter", target_modules=["v_proj"])
    models = {"base": {"checkpoint": str(tiny_model), "adapter": str(adapter)}}
    desk = Desk(write_plan, tmp_path, training=STEPS, models=models)
    plan, store = desk.copy()
    with pytest.raises(TrainingError, match="start 'base' is an adapter; merge it first"):
        train(plan, store, "dpo")
    assert checkpoints(store) == []
