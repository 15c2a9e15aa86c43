"""The same training on a GPU and, in a process that sees none, on the CPU."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu_check.processes import elsewhere
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ObjectiveConfig, TrainingConfig
from pipeline.scoring.engines.base import Group, sequence_sum
from pipeline.scoring.engines.torch_engine import TorchEngine
from pipeline.training.data.examples import Example, Mismatched
from pipeline.training.run import loop
from pipeline.training.run.devices import Devices

Weights = dict[str, torch.Tensor]

_SHIFTS = (1.0, -0.5)
"""Nats by which references are not the start's, so that no gradient weight is the same."""


@dataclass(frozen=True)
class Asked:
    """A training, as it travels to another process; `table` is the start's log-probs."""

    checkpoint: Path
    examples: list[Example]
    objective: ObjectiveConfig
    config: TrainingConfig
    table: Mapping[str, float]
    dtype: str = "float32"
    tolerance: float = 1e-2

    def but(self, dtype: str = "float32", beta: float | None = None, **training: Any) -> "Asked":
        """The same with another dtype, beta or setting of `training`."""
        objective = self.objective
        if beta is not None:
            objective = ObjectiveConfig.model_validate({**objective.model_dump(), "beta": beta})
        config = TrainingConfig.model_validate({**self.config.model_dump(), **training})
        tolerance = self.tolerance if dtype == "float32" else 2.0
        return replace(self, objective=objective, config=config, dtype=dtype, tolerance=tolerance)

    def job(self, checkpoints: Path) -> loop.Job:
        """For `train`."""
        numerics = ModelConfig.model_validate(
            {"checkpoint": str(self.checkpoint), "engine": "torch", "dtype": self.dtype}
        )
        return loop.Job(
            *("it", self.objective, self.config, numerics, Checkpoint(self.checkpoint)),
            *(self.examples, [], self.table, self.tolerance, checkpoints),
        )


@dataclass(frozen=True)
class Ran:
    """What a training came to; the update is of all that is trained, on the CPU."""

    losses: list[float]
    norms: list[float]
    first_difference: float
    update: Weights = field(repr=False)
    after: Weights = field(repr=False)


def asked(
    checkpoint: Path, groups: Sequence[Group], objective: Mapping[str, Any], **training: Any
) -> Asked:
    """A training on groups of two replies, whose references are near the start's own log-probs."""
    said = ObjectiveConfig.model_validate({"reference": "base", "start": "base", **objective})
    prompts = [group.prompt_ids for group in groups]
    # Every pair's replies under the prompt before its own.
    mismatched = [
        Group(prompt, tuple(replace(c, sequence_id=f"{c.sequence_id} kl") for c in g.completions))
        for prompt, g in zip([prompts[-1], *prompts[:-1]], groups, strict=True)
    ]
    engine = TorchEngine(
        ModelConfig(checkpoint=str(checkpoint), engine="torch"), Checkpoint(checkpoint)
    )
    scored = [*groups, *mismatched] if said.spec.needs_kl else groups
    table = {
        completion.sequence_id: sequence_sum(row)
        for group, rows in zip(scored, engine.score(scored, 8192), strict=True)
        for completion, row in zip(group.completions, rows, strict=True)
    }
    engine.close()
    examples = []
    for i, (group, other) in enumerate(zip(groups, mismatched[1:] + mismatched[:1], strict=True)):
        references = (
            table[c.sequence_id] + s for c, s in zip(group.completions, _SHIFTS, strict=True)
        )
        kl: tuple[Mismatched, ...] = ()
        if said.spec.needs_kl:
            kl = tuple(Mismatched(c, table[c.sequence_id] - 2.0) for c in other.completions)
        examples.append(
            Example(
                *(f"{i:032x}", group.prompt_ids, group.completions, tuple(references)),
                mismatched={None: kl} if kl else {},
            )
        )
    config = TrainingConfig.model_validate(training)
    return Asked(checkpoint, examples, said, config, table)


def ran(
    one: Asked,
    checkpoints: Path,
    watch: Callable[[loop.Run], Callable[[], None]] | None = None,
) -> Ran:
    """Train here; `watch` is given the run and gives what is called after every step."""
    steps: list[loop.Run] = []
    before: Weights = {}
    real = loop.Run

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            steps.append(self)
            before.update({n: p.detach().cpu().clone() for n, p in self._named.items()})
            self.after = None if watch is None else watch(self)

        def step(self, *arguments: Any) -> float:
            loss: float = super().step(*arguments)
            if self.after is not None:
                self.after()
            return loss

    loop.Run = Watched  # type: ignore[misc, assignment]
    devices = Devices(one.config, one.dtype)
    try:
        trained = loop.train(one.job(checkpoints), devices)
    finally:
        loop.Run = real  # type: ignore[misc]
        devices.close()
    after = {n: p.detach().cpu() for n, p in steps[0]._named.items()}
    return Ran(
        trained.steps["loss"].to_list(),
        trained.steps["grad_norm"].to_list(),
        trained.first_step.difference,
        {n: after[n] - before[n] for n in before},
        after,
    )


def on_the_cpu(many: Sequence[Asked], folder: Path) -> list[Ran]:
    """Each trained in one process that sees no GPU; the updates come back by files."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    found = elsewhere(hidden, _trained_to_files, list(many), folder)
    return [
        replace(
            one,
            update=load_file(folder / f"update-{i}.safetensors"),
            after=load_file(folder / f"after-{i}.safetensors"),
        )
        for i, one in enumerate(found)
    ]


def _trained_to_files(many: list[Asked], folder: Path) -> list[Ran]:
    assert not torch.cuda.is_available()
    found = []
    for i, one in enumerate(many):
        came = ran(one, folder / f"checkpoints-{i}")
        for name, weights in (("update", came.update), ("after", came.after)):
            contiguous = {n: w.contiguous() for n, w in weights.items()}
            save_file(contiguous, folder / f"{name}-{i}.safetensors")
        found.append(replace(came, update={}, after={}))
    return found


def apart(a: Weights, b: Weights) -> float:
    """||a - b|| / ||b|| over all tensors."""
    assert a.keys() == b.keys()
    above = sum(float((a[n] - b[n]).double().square().sum()) for n in b)
    below = sum(float(b[n].double().square().sum()) for n in b)
    return float(np.sqrt(above / below))


def farthest(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference of two lists of numbers."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
