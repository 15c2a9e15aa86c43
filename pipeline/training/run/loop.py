"""The training loop: the reference read from the tables, steps that survive a kill."""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import TrainingError
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ObjectiveConfig, TrainingConfig
from pipeline.progress import progress
from pipeline.scoring.memory import is_out_of_memory
from pipeline.training.data.examples import Example
from pipeline.training.data.schedule import step_ids
from pipeline.training.run.checkpoints import (
    Standing,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from pipeline.training.run.devices import Devices
from pipeline.training.run.gate import FirstStep, compare_first_step
from pipeline.training.run.model import require_vocabulary, trainable_model
from pipeline.training.run.numbers import means_of
from pipeline.training.run.replicas import Replicas
from pipeline.training.run.sharding import gathered, local
from pipeline.training.run.step import Report, Work, run_step
from schemas import TrainingEvaluation, TrainingStep, polars_schema


@dataclass(frozen=True)
class Job:
    """What a policy is trained with.

    Attributes:
        name: the objective's, for the progress bar.
        objective: loss and its values.
        config: optimiser and schedule.
        numerics: dtype and attention of the start, in which the reference's values are.
        start: the model to start from.
        examples: what to train on, with the reference's log-probs.
        held_out: what to evaluate on; empty for no evaluation.
        start_logprobs: sequence ids to the ledger's log-probs of the start, for the gate.
        tolerance: what the first step may differ from the tables, nats per sequence.
        checkpoints: the folder for them.
    """

    name: str
    objective: ObjectiveConfig
    config: TrainingConfig
    numerics: ModelConfig
    start: Checkpoint
    examples: Sequence[Example]
    held_out: Sequence[Example]
    start_logprobs: Mapping[str, float]
    tolerance: float
    checkpoints: Path


@dataclass(frozen=True)
class Trained:
    """What training leaves: its tables (without `policy_id`), the gate, and the model.

    `kept` is the step whose weights the model has: the last, or the best evaluated.
    """

    steps: pl.DataFrame
    evaluations: pl.DataFrame
    first_step: FirstStep
    model: Any
    kept: int


def train(job: Job, devices: Devices) -> Trained:
    """Train one policy, or go on where its checkpoints stand, and return it, unsaved.

    The reference is not loaded. A step's prompts are computed once for all their replies where the
    model can. Nothing random happens after the adapter's first weights are drawn.

    Raises:
        TrainingError: names the step and the cause; the last checkpoint is intact.
    """
    import torch

    config = job.config
    by_id = {example.example_id: example for example in job.examples}
    schedule = step_ids({i: example.n_tokens for i, example in by_id.items()}, config)
    require_vocabulary(job.start, max(_largest_id(e) for e in (*job.examples, *job.held_out)))
    torch.set_float32_matmul_precision("highest")
    # A model that is sharded need not fit on a device.
    place = torch.device("cpu") if devices.shards else devices.device
    model = trainable_model(job.start, job.numerics, config, place)
    with ExitStack() as stack:
        within = devices.shard(model)
        replicas = stack.enter_context(Replicas(model, config.threads, within))
        run = Run(job, devices, replicas, len(schedule))
        standing = run.resumed()
        examples = sum(len(batch) for batch in schedule)
        bar = stack.enter_context(progress(f"train {job.name}", examples, "examples"))
        bar.advance(standing.examples, 0)
        lock = threading.Lock()

        def report(rows: int, tokens: int) -> None:
            with lock:
                bar.advance(rows, tokens)

        while standing.step < len(schedule) and not run.stopped():
            batch = [by_id[i] for i in schedule[standing.step]]
            with _saying_what_would_fit(standing.step + 1):
                loss = run.step(batch, report)
            bar.bar.set_description_str(f"train {job.name} loss {loss:.4f}", refresh=False)
        trained = run.finish()
    return run.trained(trained)


@contextmanager
def _saying_what_would_fit(step: int) -> Iterator[None]:
    """Say of a step that does not fit what would make it smaller."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"step {step}: out of memory (a smaller training.micro_batch_tokens takes less, and so "
            "does training.gradient_checkpointing; neither changes a result beyond rounding): "
            f"{error}"
        ) from error


class Run:
    """A model being trained, with its optimiser and how far it is."""

    def __init__(self, job: Job, devices: Devices, replicas: Replicas, n_steps: int) -> None:
        import torch
        from transformers import get_scheduler

        config = job.config
        self._job, self._devices, self._replicas = job, devices, replicas
        names = (n for n, p in replicas.model.named_parameters() if p.requires_grad)
        self._named = dict(zip(names, replicas.parameters, strict=True))
        plain = torch.optim.AdamW(
            replicas.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self._optimiser = devices.prepare(plain)
        # The rate is a function of the step alone.
        (self._rate,) = get_scheduler(
            config.schedule,
            plain,
            num_warmup_steps=round(config.warmup_share * n_steps),
            num_training_steps=n_steps,
        ).lr_lambdas
        self._n_steps = n_steps
        self._standing = Standing()

    def resumed(self) -> Standing:
        """Go back to the newest checkpoint, if there is one."""
        with self._devices.first_alone():  # which removes damaged ones
            found = load_checkpoint(self._job.checkpoints, self._named, self._optimiser)
        self._devices.require_agreed("the checkpoint to go on from", found and found.step)
        if found is not None:
            self._standing = found
            self._devices.load_scale(found.scale)
        return self._standing

    def stopped(self) -> bool:
        """Whether no evaluation has been better for as long as the plan waits."""
        patience = self._job.config.patience
        return patience is not None and self._standing.waited >= patience

    def step(self, batch: Sequence[Example], report: Report) -> float:
        """One optimiser step; its loss before the update."""
        job, standing, config = self._job, self._standing, self._job.config
        number = standing.step + 1
        if standing.step == 0 and not standing.evaluations:
            self._evaluate()
        mine = self._devices.mine(len(batch))
        work = Work(batch, number, mine, standing.statistics)
        result = run_step(
            self._replicas,
            work,
            job.objective,
            self._most_tokens,
            report,
            gather=self._devices.gather,
            scale=self._devices.scale,
            autocast=self._devices.autocast,
            token_statistics=config.token_statistics,
        )
        others = [example for i, example in enumerate(batch) if i not in mine]
        report(len(others), sum(example.n_tokens for example in others))
        seen = self._devices.in_order(result.seen, len(batch))
        metrics = means_of(seen, batch)
        if standing.first_step is None:
            gate = compare_first_step(batch, seen, job.start_logprobs, job.tolerance)
            standing.first_step = gate.to_dict()
        self._devices.sum_gradients(self._replicas.parameters)
        norm = self._devices.clip(self._replicas.parameters, config.max_grad_norm)
        if self._devices.skips_overflow and not math.isfinite(norm):
            norm = 0.0  # no update is made
        _require_finite(number, {**metrics, **result.statistics, "grad_norm": norm})
        rate = float(self._rate(standing.step)) * config.learning_rate
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        standing.step = number
        standing.examples += len(batch)
        standing.tokens += sum(
            e.n_tokens
            + sum(len(e.prompt_ids) + len(r.completion.ids) for r in e.mismatched_in(number))
            for e in batch
        )
        standing.statistics = dict(result.statistics)
        row = {
            "step": number,
            "epoch": standing.examples / len(job.examples),
            **metrics,
            "kl": result.statistics.get("kl"),
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": standing.tokens,
        }
        standing.rows.append(row)
        self._devices.log(row, number)
        last = number == self._n_steps
        if (config.evaluate_every and number % config.evaluate_every == 0) or last:
            self._evaluate()
        if number % config.checkpoint_every == 0 and not last:
            self._save()
        assert metrics["loss"] is not None
        return metrics["loss"]

    def finish(self) -> Any:
        """The trained model; with the best evaluated weights, where the plan asks for them.

        A sharded one is whole again in the first process, on the CPU; the others have None.
        """
        self._require_finite_weights()
        best = self._standing.best
        if self._job.config.keep_best and best is not None and best[0] != self._standing.step:
            load_weights(self._job.checkpoints, best[0], self._named)
        return self._whole_model() if self._replicas.sharded else self._replicas.model

    def _whole_model(self) -> Any:
        import torch

        weights = gathered(self._named, self._devices.first)
        if not self._devices.first:
            return None
        job = self._job
        model = trainable_model(job.start, job.numerics, job.config, torch.device("cpu"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        return model

    def trained(self, model: Any) -> Trained:
        """The tables, with the model that `finish` gave."""
        standing, config = self._standing, self._job.config
        steps, evaluations = (
            pl.DataFrame(
                rows,
                schema={k: v for k, v in polars_schema(table).items() if k != "policy_id"},
            )
            for rows, table in (
                (standing.rows, TrainingStep),
                (standing.evaluations, TrainingEvaluation),
            )
        )
        assert standing.first_step is not None
        kept = standing.best[0] if config.keep_best and standing.best else standing.step
        return Trained(steps, evaluations, FirstStep(**standing.first_step), model, kept)

    @property
    def _most_tokens(self) -> int:
        config = self._job.config
        return config.micro_batch_tokens or (512 if self._devices.on_cpu else 8192)

    def _evaluate(self) -> None:
        """Losses and rewards of the held-out examples, and whether they are the best so far."""
        job, standing, config = self._job, self._standing, self._job.config
        if not config.evaluate_every or not job.held_out:
            return
        if job.objective.spec.needs_kl and not standing.statistics:
            return  # no reference point was measured yet
        work = Work(job.held_out, None, self._devices.mine(len(job.held_out)), standing.statistics)
        result = run_step(
            self._replicas,
            work,
            job.objective,
            self._most_tokens,
            lambda rows, tokens: None,
            gather=self._devices.gather,
            autocast=self._devices.autocast,
            token_statistics=config.token_statistics,
            train=False,
        )
        seen = self._devices.in_order(result.seen, len(job.held_out))
        row = {
            "step": standing.step,
            "n": len(seen),
            **{f"eval_{k}": v for k, v in means_of(seen, job.held_out).items()},
        }
        _require_finite(standing.step, row)
        standing.evaluations.append(row)
        self._devices.log(row, standing.step)
        value = row[config.best_metric]
        if value is None:
            raise TrainingError(f"step {standing.step}: there is no {config.best_metric}")
        sign = -1.0 if config.best_metric.endswith("loss") else 1.0
        if standing.best is None or sign * value > sign * standing.best[1]:
            standing.best, standing.waited = (standing.step, value), 0
            if config.keep_best:
                self._save()
        else:
            standing.waited += 1

    def _require_finite_weights(self) -> None:
        """What an update made infinite is neither a checkpoint nor a policy."""
        for name, parameter in self._named.items():
            if not local(parameter).isfinite().all():
                raise TrainingError(
                    f"step {self._standing.step}: its update left {name} not finite"
                )

    def _save(self) -> None:
        self._require_finite_weights()
        self._standing.scale = self._devices.scale_state()
        save_checkpoint(
            self._job.checkpoints,
            self._standing,
            self._named,
            self._optimiser,
            self._job.config.keep_checkpoints,
            first=self._devices.first,
        )
        self._devices.wait()


def _largest_id(example: Example) -> int:
    ids = [example.prompt_ids, *(reply.ids for reply in example.replies)]
    return max(int(of.max()) for of in ids)


def _require_finite(step: int, metrics: Mapping[str, float | None]) -> None:
    for name, value in metrics.items():
        if value is not None and not abs(value) < float("inf"):
            raise TrainingError(f"step {step}: {name} is {value}")
