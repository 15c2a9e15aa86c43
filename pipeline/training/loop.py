"""The training loop: LoRA over the start model, the reference read from the tables."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from pipeline.errors import TrainingError
from pipeline.losses import PairBatch
from pipeline.models import Checkpoint, load_model
from pipeline.plan import ModelConfig, ObjectiveConfig, TrainingConfig
from pipeline.progress import progress
from pipeline.scoring.engines.base import Completion, Group, sequence_sum
from pipeline.scoring.engines.forward import Forward
from pipeline.scoring.engines.torch_engine import torch_device
from pipeline.training.batches import TrainingPair, schedule_of, steps_per_epoch
from schemas import TrainingStep, polars_schema

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FirstStep:
    """The trainer's own forward before any update, against the tables.

    Attributes:
        n: sequences compared.
        difference: the largest difference per sequence, nats.
        tolerance: what it may be.
        accuracy: share of the first batch's pairs ranked right, ties half; exactly 0.5 when start
            and reference are one model.
    """

    n: int
    difference: float
    tolerance: float
    accuracy: float

    @property
    def passed(self) -> bool:
        """The trainer starts where the tables say."""
        return self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


@dataclass(frozen=True)
class Trained:
    """What training leaves: the steps (without `policy_id`), the gate, and how to save."""

    steps: pl.DataFrame
    first_step: FirstStep
    save_adapter: Callable[[Path], None]


def train(
    name: str,
    objective: ObjectiveConfig,
    config: TrainingConfig,
    start_config: ModelConfig,
    start: Checkpoint,
    pairs: list[TrainingPair],
    start_logprobs: pl.DataFrame,
    tolerance: float,
) -> Trained:
    """Train one policy from `start` and return it, unsaved.

    A step's loss is the mean over its pairs; one pair is in memory at a time, its prompt computed
    once for both replies where the model can. The model stays in
    evaluation mode: dropout would make the reference and the start differ at step 0.

    Args:
        name: the objective's, for the progress bar.
        objective: loss and its values.
        config: optimiser and schedule.
        start_config: dtype and attention, the numerics the reference's values are in.
        start: the model to start from.
        pairs: what to train on, with the reference's log-probs.
        start_logprobs: the ledger's rows of the start model, for the first-step gate.
        tolerance: what the first step may differ from the tables, nats per sequence.

    Raises:
        TrainingError: names the step and the cause.
    """
    import torch
    from transformers import get_scheduler

    schedule = schedule_of(pairs, config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("highest")
    model = _with_adapter(start, start_config, config)
    forward = Forward(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = get_scheduler(
        config.schedule,
        optimiser,
        num_warmup_steps=round(config.warmup_share * len(schedule)),
        num_training_steps=len(schedule),
    )
    table = dict(start_logprobs.select("sequence_id", "logprob").iter_rows())
    per_epoch = steps_per_epoch(len(pairs), config)
    rows: list[dict[str, Any]] = []
    first: FirstStep | None = None
    with progress(f"train {name}", sum(len(batch) for batch in schedule), "pairs") as bar:
        for step, batch in enumerate(schedule, start=1):
            seen = []
            statistics = _statistics(forward, batch, step, objective, bar.advance)
            for pair in batch:
                seen.append(_backward(forward, pair, objective, statistics, len(batch)))
                bar.advance(1, pair.n_tokens)
            metrics = _means(seen)
            if first is None:
                first = _first_step(batch, seen, table, tolerance)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
            _require_finite(step, {**metrics, **statistics, "grad_norm": norm})
            rate = scheduler.get_last_lr()[0]
            optimiser.step()
            scheduler.step()
            optimiser.zero_grad(set_to_none=True)
            rows.append(
                {
                    "step": step,
                    "epoch": step / per_epoch,
                    **metrics,
                    "kl": statistics.get("kl"),
                    "grad_norm": norm,
                    "learning_rate": rate,
                    "num_tokens": bar.n_tokens,
                }
            )
            bar.bar.set_description_str(f"train {name} loss {metrics['loss']:.4f}", refresh=False)
    schema = {k: v for k, v in polars_schema(TrainingStep).items() if k != "policy_id"}
    assert first is not None  # a schedule has at least one step
    return Trained(pl.DataFrame(rows, schema=schema), first, model.save_pretrained)


def _with_adapter(
    start: Checkpoint, start_config: ModelConfig, config: TrainingConfig
) -> "PreTrainedModel":
    import torch
    from peft import LoraConfig, get_peft_model

    model = load_model(
        start,
        dtype=start_config.dtype,
        attention=start_config.attention,
        device=str(torch_device()),
    )
    targets: str | list[str] = config.lora.target_modules
    layers = None
    if config.lora.last_layers is not None:
        n = model.config.num_hidden_layers
        layers = list(range(max(0, n - config.lora.last_layers), n))
        if targets == "all-linear":  # PEFT takes layers with names only
            body = model.base_model.named_modules()
            linear = {name for name, module in body if isinstance(module, torch.nn.Linear)}
            targets = sorted({name.rpartition(".")[2] for name in linear})
    adapter = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter).eval()
    except ValueError as error:
        raise TrainingError(f"no adapter can be put on {start.path}: {error}") from error


def _statistics(
    forward: Forward,
    batch: list[TrainingPair],
    step: int,
    objective: ObjectiveConfig,
    report: Callable[[int, int], None],
) -> dict[str, float]:
    """What the loss must know of the whole step, before its update and without a gradient.

    `kl`: the mean log-ratio of the step's mismatched replies, nats, at least 0 (arXiv 2402.01306,
    section 4.1). Over the step, so that it does not depend on how the step is cut into passes.
    """
    import torch

    if not objective.spec.needs_kl:
        return {}
    ratios = []
    with torch.no_grad():
        for pair in batch:
            replies = pair.mismatched_in(step)
            completions = [reply.completion for reply in replies]
            logprobs = _sequence_logprobs(forward, pair.prompt_ids, completions)
            for reply, logprob in zip(replies, logprobs, strict=True):
                ratios.append(logprob.item() - reply.reference)
                report(0, len(pair.prompt_ids) + len(reply.completion.ids))
    if not ratios:
        raise TrainingError(f"step {step}: {objective.loss} needs mismatched replies, and has none")
    # In this order, so that NaN stays NaN and is refused.
    return {"kl": max(math.fsum(ratios) / len(ratios), 0.0)}


def _backward(
    forward: Forward,
    pair: TrainingPair,
    objective: ObjectiveConfig,
    statistics: Mapping[str, float],
    n_pairs: int,
) -> dict[str, float]:
    """Add one pair's share of the step's gradient; returns its numbers before the update."""
    import torch

    spec, values = objective.spec, objective.values
    completions = [pair.chosen, pair.rejected]
    sides = _sequence_logprobs(forward, pair.prompt_ids, completions)
    references = (pair.reference_chosen, pair.reference_rejected)
    lengths = [float(len(completion.scored)) for completion in completions]
    constants = torch.tensor(
        [*references, *lengths], dtype=torch.float64, device=sides[0].device
    ).unbind()
    batch = PairBatch(*[number[None] for number in (*sides, *constants)])
    loss = spec.loss(batch, values, statistics)[0]
    torch.autograd.backward(loss / n_pairs)
    chosen, rejected = (side.item() for side in sides)
    rewards = [
        # As TRL logs them: beta x log-ratio whatever the loss's own scale, if it has a reference.
        values["beta"] * (logprob - reference)
        if spec.needs_reference
        else float(spec.score(logprob, logprob, length, values))
        for logprob, reference, length in zip((chosen, rejected), references, lengths, strict=True)
    ]
    margin = rewards[0] - rewards[1]
    return {
        "loss": loss.item(),
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": margin,
        "rewards/accuracies": 0.5 * ((margin > 0) + (margin >= 0)),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def _sequence_logprobs(
    forward: Forward, prompt_ids: np.ndarray, completions: list[Completion]
) -> "list[torch.Tensor]":
    """Log-probs of one prompt's sequences, float64 scalars of exactly the ledger's values.

    Where it matters to the bits what goes through the model together, that is what the engine puts
    together: the same shapes give the same bits at step 0.
    """
    one_pass = len({c.pass_id or c.sequence_id for c in completions}) == 1
    together = forward.sharing.exact or one_pass
    passes = [completions] if together else [[c] for c in completions]
    logprobs = [
        row for members in passes for row in forward.logprobs([Group(prompt_ids, (*members,))])[0]
    ]
    totals = []
    for row in logprobs:
        total = row.double().sum()
        exact = sequence_sum(row.detach().cpu().numpy())
        totals.append(total + (exact - total.detach()))  # torch adds in another order
    return totals


def _first_step(
    batch: list[TrainingPair],
    seen: list[dict[str, float]],
    table: Mapping[str, float],
    tolerance: float,
) -> FirstStep:
    """Compare the first batch with the start model's rows in the ledger.

    Raises:
        TrainingError: they differ by more than the tolerance: another template, another
            reference, an adapter too many.
    """
    differences = []
    for pair, numbers in zip(batch, seen, strict=True):
        for side, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            with suppress(KeyError):
                held = table[completion.sequence_id]
                differences.append(abs(numbers[f"logps/{side}"] - held))
    if not differences:
        raise TrainingError("step 1: the start model has no row in the ledger to be compared with")
    accuracy = sum(numbers["rewards/accuracies"] for numbers in seen) / len(seen)
    gate = FirstStep(len(differences), max(differences), tolerance, accuracy)
    if not gate.passed:
        raise TrainingError(
            f"step 1: before any update the trainer's log-probs differ from the start model's in "
            f"the ledger by up to {gate.difference:.3g} nats (allowed: {tolerance:.3g})"
        )
    return gate


def _means(seen: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(numbers[key] for numbers in seen) / len(seen) for key in seen[0]}


def _require_finite(step: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if not abs(value) < float("inf"):
            raise TrainingError(f"step {step}: {name} is {value}")
