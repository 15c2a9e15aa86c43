"""A policy: its id, and training it once."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.errors import TrainingError
from pipeline.failpoints import reach
from pipeline.ids import content_id
from pipeline.models import copy_tokeniser, identify
from pipeline.plan import ObjectiveConfig, TrainingConfig
from pipeline.scoring.ledger import ScorerKey
from pipeline.store import (
    Store,
    checked,
    file_digest,
    read_snapshot,
    whole_directory,
    write_parquet,
)
from pipeline.training.data.balance import ClassBalance
from pipeline.training.data.correction import Correction
from pipeline.training.data.examples import Example, values_digest
from pipeline.training.data.selection import SelectionRecord
from pipeline.training.record import read_record, write_record
from pipeline.training.run.devices import Devices
from pipeline.training.run.gate import FirstStep
from pipeline.training.run.loop import Job, Trained, train
from schemas import Table, TrainedExample, TrainingEvaluation, TrainingStep, polars_schema

if TYPE_CHECKING:
    from pipeline.training.retrain import Kept

TRAINER_VERSION = 3
"""Raised when the same inputs would give other weights."""


@dataclass(frozen=True)
class PolicyResult:
    """A policy on disk; `trained` is false if it was there already.

    Its weights are those after step `kept`: the last, or the best evaluated. `balance` is None
    for a loss without a weight for a class of rows. `selection` is what would be trained on now;
    where the policy is retained all the same, `retained` says why. `settings` are the plan's
    (`pipeline.training.retrain`).
    """

    policy_id: str
    directory: Path
    trained: bool
    steps: pl.DataFrame
    evaluations: pl.DataFrame
    first_step: FirstStep
    correction: Correction | None
    kept: int
    balance: ClassBalance | None
    selection: SelectionRecord | None = None
    retained: "Kept | None" = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def policy_id(
    start: ScorerKey,
    reference: ScorerKey | None,
    objective: ObjectiveConfig,
    config: TrainingConfig,
    examples: list[Example],
    held_out: list[Example],
) -> str:
    """Content id of everything that decides the weights; equal ids train once.

    Args:
        start: the start model in the trainer's numerics.
        reference: the reference as it was scored; None for a loss that has none.
        objective: the loss and its values.
        config: optimiser and schedule.
        examples: what is trained on, with the reference's values as they are used.
        held_out: what is evaluated on; it matters where evaluations decide what is kept.
    """
    decides = config.keep_best or config.patience is not None
    return content_id(
        "policy",
        {
            "start": start.model.model_id,
            "trainer_numerics": start.numerics.numerics_id,
            "reference": reference and reference.model.model_id,
            "reference_numerics": reference and reference.numerics.numerics_id,
            "values": values_digest(examples),
            "held_out": values_digest(held_out) if decides else None,
            "objective": {"loss": objective.loss, "values": objective.values},
            "training": config.identity,
            "version": TRAINER_VERSION,
        },
    )


def train_policy(
    store: Store,
    identifier: str,
    job: Job,
    correction: Correction | None,
    balance: ClassBalance | None,
    selection: SelectionRecord | None = None,
) -> PolicyResult:
    """Train a policy, go on with it, or find it trained; nobody else may do so meanwhile.

    The policy's directory appears whole or not at all: its adapter in PEFT form or the whole model
    in Hugging Face form (safetensors), the tokeniser, the training's tables, and `policy.json` with
    what it came from. Until then its checkpoints are beside it.

    Raises:
        TrainingError: the first step does not agree with the tables, or a loss or gradient is not
            finite; names the step.
    """
    final = store.policies / identifier
    if final.exists():
        shutil.rmtree(job.checkpoints, ignore_errors=True)  # of who was killed before it did so
        return load_policy(final, trained=False)
    logs = store.directory / "tensorboard" / f"{job.name}-{identifier}"
    devices = Devices(job.config, job.numerics.dtype, job.name, logs)
    try:
        trained = train(job, devices)
        if devices.first:
            _save(store, final, identifier, job, trained, correction, balance, selection)
            shutil.rmtree(job.checkpoints, ignore_errors=True)
        devices.wait()
    finally:
        devices.close()
    return load_policy(final, trained=True)


def refuse_adapter(job: Job) -> None:
    """No adapter on an adapter.

    Raises:
        TrainingError: the start is one.
    """
    if job.start.adapter is not None:
        raise TrainingError(
            f"objective '{job.name}': its start '{job.objective.start}' is an adapter; merge it "
            "first (an adapter on an adapter is not trained)"
        )


def _save(
    store: Store,
    final: Path,
    identifier: str,
    job: Job,
    trained: Trained,
    correction: Correction | None,
    balance: ClassBalance | None,
    selection: SelectionRecord | None,
) -> None:
    from safetensors import SafetensorError

    for left in store.policies.glob(f".{identifier}.*.tmp"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    try:
        with whole_directory(final) as temporary:
            reach("policy.begun")
            trained.model.save_pretrained(temporary)
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty form
            copy_tokeniser(job.start.path, temporary)
            digests = {file.name: file_digest(file) for file in temporary.glob("*.safetensors")}
            tables = {name: getattr(trained, attribute) for name, (attribute, _) in _TABLES.items()}
            schemas = {name: schema for name, (_, schema) in _TABLES.items()}
            tables[_EXAMPLES], schemas[_EXAMPLES] = _as_table(job.examples), TrainedExample
            for name, schema in schemas.items():
                rows = tables[name].select(pl.lit(identifier).alias("policy_id"), pl.all())
                with (temporary / f"{name}.parquet").open("wb") as sink:
                    write_parquet(sink, checked(name, rows, schema), name)
                digests[name] = file_digest(temporary / f"{name}.parquet")
            record = {
                "policy_id": identifier,
                "objective": {"name": job.name, **job.objective.model_dump()},
                "training": job.config.model_dump(),
                "start": str(job.start.path),
                "start_model_id": identify(job.start, store).model_id,
                "dtype": job.numerics.dtype,
                "first_step": trained.first_step.to_dict(),
                "reference_correction": correction and correction.to_dict(),
                "selection": selection and selection.to_dict(),
                "kept": trained.kept,
                "class_balance": balance and balance.to_dict(),
                "blake3": digests,
            }
            write_record(temporary, record)
            reach("policy.written")
        reach("policy.published")
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        raise TrainingError(
            f"step {trained.steps.height}: the policy cannot be written to {final}: {error}"
        ) from error


_TABLES: dict[str, tuple[str, type[Table]]] = {
    "training_steps": ("steps", TrainingStep),
    "training_evaluations": ("evaluations", TrainingEvaluation),
}


_EXAMPLES = "trained_examples"


def _as_table(examples: Sequence[Example]) -> pl.DataFrame:
    rows = [(example.example_id, example.weight) for example in examples]
    columns = {k: v for k, v in polars_schema(TrainedExample).items() if k != "policy_id"}
    return pl.DataFrame(rows, schema=columns, orient="row").sort("example_id")


def trained_examples(store: Store, identifier: str) -> pl.DataFrame:
    """What a policy was given to train on, as `schemas.TrainedExample`.

    Raises:
        StoreError: the list is missing or damaged.
    """
    directory = store.policies / identifier
    record = read_record(directory)
    path = directory / f"{_EXAMPLES}.parquet"
    return read_snapshot(path, _EXAMPLES, record["blake3"][_EXAMPLES])


def load_policy(directory: Path, *, trained: bool) -> PolicyResult:
    """A finished policy's tables and record."""
    record = read_record(directory)
    steps, evaluations = (
        read_snapshot(directory / f"{name}.parquet", name, record["blake3"][name])
        for name in _TABLES
    )
    corrected, balance = record["reference_correction"], record.get("class_balance")
    return PolicyResult(
        record["policy_id"],
        directory,
        trained,
        steps,
        evaluations,
        FirstStep(**record["first_step"]),
        corrected and Correction(**corrected),
        record["kept"],
        balance and ClassBalance(**balance),
    )
