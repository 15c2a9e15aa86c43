"""The training loop: LoRA over the start model, the reference read from the tables."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.errors import TrainingError
from pipeline.models import Checkpoint, load_model
from pipeline.plan import ModelConfig, ObjectiveConfig, TrainingConfig
from pipeline.progress import progress
from pipeline.scoring.engines.forward import Forward
from pipeline.scoring.engines.torch_engine import torch_device
from pipeline.training.batches import TrainingPair, schedule_of, steps_per_epoch
from pipeline.training.step import backward, look_ahead
from schemas import TrainingStep, polars_schema

if TYPE_CHECKING:
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
    statistics: Mapping[str, float] = {}
    with progress(f"train {name}", sum(len(batch) for batch in schedule), "pairs") as bar:
        for step, batch in enumerate(schedule, start=1):
            seen = []
            ahead = look_ahead(forward, batch, step, objective, statistics, bar.advance)
            statistics = ahead.statistics
            for pair, row in zip_longest(batch, ahead.rows):
                seen.append(backward(forward, pair, objective, statistics, len(batch), row))
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
