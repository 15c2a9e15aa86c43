"""What the trainers do, each in a process of its own; all get the same examples."""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.devices import peak_mib, synchronise
from benchmarks.scoring.__main__ import prepare
from benchmarks.scoring.work import quiet
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ObjectiveConfig, TrainingConfig
from pipeline.scoring.engines.base import sequence_sum
from pipeline.scoring.engines.torch_engine import TorchEngine, torch_device
from pipeline.training.data.examples import Example

_SHIFTS = (1.0, -0.5)
"""Nats by which references are not the start's, so that no gradient weight is the same."""


@dataclass(frozen=True)
class Ran:
    """A run: seconds and losses of the counted steps, and the most memory the process had."""

    seconds: list[float]
    losses: list[float]
    peak_mib: float


def prepared(options: argparse.Namespace) -> tuple[Checkpoint, list[list[Example]]]:
    """The model, and batches with their references: first the shortest pairs, then the counted."""
    quiet()
    checkpoint, pairs, groups = prepare(options)
    engine = TorchEngine(ModelConfig(checkpoint=options.model, engine="torch"), checkpoint)
    logprobs, completions = {}, {}
    for group, rows in zip(groups, engine.score(groups, 1024), strict=True):
        for completion, row in zip(group.completions, rows, strict=True):
            logprobs[completion.sequence_id] = sequence_sum(row)
            completions[completion.sequence_id] = (group.prompt_ids, completion)
    examples = []
    for pair in pairs:
        ids = (pair.chosen_id, pair.rejected_id)
        examples.append(
            Example(
                "-".join(ids),
                completions[ids[0]][0],
                tuple(completions[i][1] for i in ids),
                tuple(logprobs[i] + shift for i, shift in zip(ids, _SHIFTS, strict=True)),
            )
        )
    size = options.step_pairs
    counted = [examples[i : i + size] for i in range(0, len(examples), size)]
    shortest = sorted(examples, key=lambda example: example.n_tokens)[:size]
    return checkpoint, [shortest, *counted]


def _objective() -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(
        {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "base"}
    )


def _numerics(dtype: str) -> ModelConfig:
    return ModelConfig.model_validate({"checkpoint": "base", "engine": "torch", "dtype": dtype})


def ours(
    checkpoint: Checkpoint,
    batches: list[list[Example]],
    config: TrainingConfig,
    dtype: str = "float32",
) -> Ran:
    """Our steps, in a GPU's case in float32 or under autocast."""
    from pipeline.training.run.devices import Devices
    from pipeline.training.run.loop import Job, Run
    from pipeline.training.run.model import trainable_model
    from pipeline.training.run.replicas import Replicas

    quiet()
    numerics = _numerics(dtype)
    devices = Devices(config, dtype)
    model = trainable_model(checkpoint, numerics, config, devices.device)
    examples = [example for batch in batches[1:] for example in batch]
    with tempfile.TemporaryDirectory() as place, Replicas(model, config.threads) as replicas:
        table = {
            reply.sequence_id: value - shift
            for example in examples
            for reply, value, shift in zip(
                example.replies, example.references, _SHIFTS, strict=True
            )
        }
        job = Job(
            *("ours", _objective(), config, numerics, checkpoint, examples, []),
            table,
            1e-2 if dtype == "float32" else 2.0,
            Path(place),
        )
        run = Run(job, devices, replicas, len(batches))
        seconds, losses = [], []
        for batch in batches:
            synchronise()
            began = perf_counter()
            losses.append(run.step(batch, lambda *_: None))
            synchronise()
            seconds.append(perf_counter() - began)
    return Ran(seconds[1:], losses[1:], peak_mib())


def trls(
    checkpoint: Checkpoint,
    batches: list[list[Example]],
    config: TrainingConfig,
    micro: int,
    statistics: bool,
    dtype: str = "float32",
) -> Ran:
    """TRL's steps, so many pairs at once, with or without what its metrics alone read."""
    from benchmarks.training.trl import trl_trainer
    from pipeline.training.run.model import trainable_model

    quiet()
    model = trainable_model(checkpoint, _numerics(dtype), config, torch_device())
    trainer, run = trl_trainer(
        *("dpo", {"beta": 0.1}, model, checkpoint, batches, config),
        micro=micro,
        statistics=statistics,
        bf16=dtype == "bfloat16",
    )
    trainer.train()
    return Ran(run.seconds[1:], run.losses[1:], peak_mib())
