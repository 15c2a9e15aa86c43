"""A policy: its id, and training it once."""

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.errors import TrainingError
from pipeline.ids import content_id
from pipeline.models import Checkpoint, publish_directory
from pipeline.plan import ModelConfig, ObjectiveConfig, TrainingConfig
from pipeline.scoring.ledger import ScorerKey
from pipeline.store import Store, checked, file_digest, read_snapshot, write_parquet
from pipeline.training.batches import TrainingPair, values_digest
from pipeline.training.correction import Correction
from pipeline.training.loop import FirstStep, Trained, train
from schemas import TrainingStep

TRAINER_VERSION = 2
"""Raised when the same inputs would give other weights."""


@dataclass(frozen=True)
class PolicyResult:
    """A policy on disk; `trained` is false if it was there already."""

    policy_id: str
    directory: Path
    trained: bool
    steps: pl.DataFrame
    first_step: FirstStep
    correction: Correction | None


def policy_id(
    start: ScorerKey,
    reference: ScorerKey | None,
    objective: ObjectiveConfig,
    config: TrainingConfig,
    pairs: list[TrainingPair],
) -> str:
    """Content id of everything that decides the weights; equal ids train once.

    Args:
        start: the start model in the trainer's numerics.
        reference: the reference as it was scored; None for a loss that has none.
        objective: the loss and its values.
        config: optimiser and schedule.
        pairs: what is trained on, with the reference's values as they are used.
    """
    return content_id(
        "policy",
        {
            "start": start.model.model_id,
            "trainer_numerics": start.numerics.numerics_id,
            "reference": reference and reference.model.model_id,
            "reference_numerics": reference and reference.numerics.numerics_id,
            "values": values_digest(pairs),
            "objective": {"loss": objective.loss, "values": objective.values},
            # Whether a reference was corrected shows in its values.
            "training": config.model_dump(exclude={"reference_correction"}),
            "version": TRAINER_VERSION,
        },
    )


def train_policy(
    store: Store,
    name: str,
    objective: ObjectiveConfig,
    config: TrainingConfig,
    start_config: ModelConfig,
    start: Checkpoint,
    start_key: ScorerKey,
    reference_key: ScorerKey | None,
    pairs: list[TrainingPair],
    start_logprobs: pl.DataFrame,
    tolerance: float,
    correction: Correction | None,
) -> PolicyResult:
    """Train the objective's policy, or find it trained.

    The policy's directory appears whole or not at all: its adapter in PEFT form (safetensors),
    the tokeniser, the training steps, and `policy.json` with what it came from.

    Raises:
        TrainingError: the first step does not agree with the tables, or a loss or gradient is not
            finite.
    """
    if start.adapter is not None:
        raise TrainingError(
            f"objective '{name}': its start '{objective.start}' is an adapter; merge it first "
            "(an adapter on an adapter is not trained)"
        )
    identifier = policy_id(start_key, reference_key, objective, config, pairs)
    final = store.policies / identifier
    if not final.exists():
        trained = train(
            name, objective, config, start_config, start, pairs, start_logprobs, tolerance
        )
        _save(store, final, identifier, name, objective, config, start, trained, correction)
        return _load(final, identifier, trained=True)
    return _load(final, identifier, trained=False)


def _save(
    store: Store,
    final: Path,
    identifier: str,
    name: str,
    objective: ObjectiveConfig,
    config: TrainingConfig,
    start: Checkpoint,
    trained: Trained,
    correction: Correction | None,
) -> None:
    temporary = store.policies / f".{uuid.uuid4().hex}.tmp"
    temporary.mkdir(parents=True)
    try:
        trained.save_adapter(temporary)
        for file in start.path.glob("*token*"):
            shutil.copy(file, temporary)
        for file in start.path.glob("chat_template*"):
            shutil.copy(file, temporary)
        steps = trained.steps.select(pl.lit(identifier).alias("policy_id"), pl.all())
        with (temporary / "training_steps.parquet").open("wb") as sink:
            write_parquet(sink, checked("training_steps", steps, TrainingStep), "training_steps")
        record = {
            "policy_id": identifier,
            "objective": {"name": name, **objective.model_dump()},
            "training": config.model_dump(),
            "start": str(start.path),
            "first_step": trained.first_step.to_dict(),
            "reference_correction": correction and correction.to_dict(),
            "steps_blake3": file_digest(temporary / "training_steps.parquet"),
        }
        (temporary / "policy.json").write_text(json.dumps(record, indent=2, sort_keys=True))
        publish_directory(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(directory: Path, identifier: str, *, trained: bool) -> PolicyResult:
    record = json.loads((directory / "policy.json").read_text())
    steps = read_snapshot(
        directory / "training_steps.parquet", "training_steps", record["steps_blake3"]
    )
    corrected = record["reference_correction"]
    return PolicyResult(
        identifier,
        directory,
        trained,
        steps,
        FirstStep(**record["first_step"]),
        corrected and Correction(**corrected),
    )
