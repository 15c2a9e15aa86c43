"""Where training stands, on disk, so that it can go on after a kill.

A checkpoint is a directory that appears whole: what is trained and the optimiser's state as
safetensors, the rest as JSON with the digests of the files. Nothing is pickled. One that is damaged
is passed over for the one before it.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import TrainingError
from pipeline.failpoints import reach
from pipeline.store import file_digest, whole_directory
from pipeline.training.run.sharding import gathered, put

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass
class Standing:
    """How far training has come.

    Attributes:
        step: optimiser steps taken.
        examples: examples seen.
        tokens: tokens seen, prompts with every reply.
        rows: of `schemas.TrainingStep`, without `policy_id`.
        evaluations: of `schemas.TrainingEvaluation`, without `policy_id`.
        statistics: what the loss knew of the last step.
        first_step: the gate's record.
        best: the best evaluation's step and metric; None before there is one.
        waited: evaluations since then.
        scale: the loss scale's state (float16).
    """

    step: int = 0
    examples: int = 0
    tokens: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    statistics: Mapping[str, float] = field(default_factory=dict)
    first_step: dict[str, Any] | None = None
    best: tuple[int, float] | None = None
    waited: int = 0
    scale: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    standing: Standing,
    parameters: "Mapping[str, torch.nn.Parameter]",
    optimiser: "torch.optim.Optimizer",
    keep: int,
    *,
    first: bool = True,
) -> None:
    """Write `folder/step-<n>`, and drop all but the last `keep` and the best one.

    The first of several processes writes; the others give it their shards, if the model has them.

    Raises:
        TrainingError: it cannot be written; names the step, and the last one is intact.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    moments = {
        f"{key}:{name}": value
        for name, p in parameters.items()
        for key, value in optimiser.state[p].items()
    }
    tensors = {
        "trained.safetensors": gathered(parameters, first),
        "optimiser.safetensors": gathered(moments, first),
    }
    final = folder / _name(standing.step)
    if not first or final.exists():
        return
    try:
        with whole_directory(final) as temporary:
            reach("checkpoint.begun")
            for name, of_file in tensors.items():
                save_file(of_file, temporary / name)
            random = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                random["cuda"] = torch.cuda.get_rng_state()
            save_file(random, temporary / "random.safetensors")
            reach("checkpoint.written")
            state = {
                "standing": vars(standing),
                "files": {file.name: file_digest(file) for file in temporary.glob("*.safetensors")},
            }
            (temporary / "state.json").write_text(json.dumps(state))
        reach("checkpoint.published")
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        raise TrainingError(f"step {standing.step}: no checkpoint in {folder}: {error}") from error
    best = None if standing.best is None else standing.best[0]
    for step, directory in _all(folder)[:-keep]:
        if step != best:
            shutil.rmtree(directory, ignore_errors=True)


def load_checkpoint(
    folder: Path,
    parameters: "Mapping[str, torch.nn.Parameter]",
    optimiser: "torch.optim.Optimizer",
) -> Standing | None:
    """Put everything back to the newest intact checkpoint; None if there is none.

    Damaged ones, and what a kill left half written, are removed.
    """
    import torch
    from safetensors.torch import load_file

    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for step, directory in reversed(_all(folder)):
        standing = _intact(directory)
        if standing is None:
            _log.warning("%s is damaged; training goes on from the checkpoint before", directory)
            shutil.rmtree(directory)
            continue
        load_weights(folder, step, parameters)
        moments = load_file(directory / "optimiser.safetensors")
        for key, value in moments.items():
            which, _, name = key.partition(":")
            parameter = parameters[name]
            if which == "step":
                # AdamW counts its steps on the CPU, unless it is fused.
                on = value.to(parameter.device) if _fused(optimiser) else value
            else:
                on = torch.zeros_like(parameter)
                put(on, value)
            optimiser.state[parameter][which] = on
        random = load_file(directory / "random.safetensors")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        return standing
    return None


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, intact or not; None if there is none."""
    return max((step for step, _ in _all(folder)), default=None)


def load_weights(folder: Path, step: int, parameters: "Mapping[str, torch.nn.Parameter]") -> None:
    """Put what is trained back to what it was after a step.

    Raises:
        TrainingError: that checkpoint is not there, or damaged.
    """
    import torch
    from safetensors.torch import load_file

    directory = folder / _name(step)
    if _intact(directory) is None:
        raise TrainingError(f"step {step}: its checkpoint {directory} is missing or damaged")
    weights = load_file(directory / "trained.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            put(parameter, weights[name])


def _name(step: int) -> str:
    return f"step-{step:08}"


def _all(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(path.name.removeprefix("step-")), path) for path in folder.glob("step-*"))


def _intact(directory: Path) -> Standing | None:
    try:
        state = json.loads((directory / "state.json").read_text())
        digests = {name: file_digest(directory / name) for name in state["files"]}
        standing = Standing(**state["standing"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if standing.best is not None:
        step, value = standing.best
        standing.best = step, value
    return standing if digests == state["files"] else None


def _fused(optimiser: "torch.optim.Optimizer") -> bool:
    return bool(optimiser.defaults.get("fused"))
