"""Training an objective of a plan: what its loss needs is gathered from the tables, or scored."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from pipeline.errors import TrainingError
from pipeline.locks import locked
from pipeline.models import Checkpoint
from pipeline.names import key_of, scored_by, wanted_sequences
from pipeline.plan import ModelConfig, Plan
from pipeline.scoring.engines import require_adapters
from pipeline.scoring.ledger import ScorerKey, read_logprobs
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store, read
from pipeline.training.data.balance import ClassBalance, class_balance
from pipeline.training.data.correction import Correction, correct_reference
from pipeline.training.data.examples import Example, training_examples
from pipeline.training.data.preferences import Preferences, read_preferences
from pipeline.training.data.selection import Selected, SelectionRecord, selected_pairs
from pipeline.training.policy import (
    PolicyResult,
    load_policy,
    policy_id,
    refuse_adapter,
    train_policy,
)
from pipeline.training.ranks.start import train_in_processes
from pipeline.training.retrain import kept_policy, settings_of
from pipeline.training.run.loop import Job

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A policy's id, what it is trained with, and how that was come to."""

    policy_id: str
    job: Job
    correction: Correction | None
    balance: ClassBalance | None
    selection: SelectionRecord | None
    settings: Mapping[str, Any]


def train_objective(plan: Plan, store: Store, name: str) -> PolicyResult:
    """Train the policy of an objective, find it trained, or keep the one it has.

    Who wants a policy that is being trained waits for it; if that training fails or is killed,
    goes on with it.

    Raises:
        TrainingError: as `prepare`, `refuse_adapter` and `train_policy`.
        ModelError: as `require_adapters`.
        LogratioError: as `train_in_processes`, if there are to be several.
        StoreError: the checkpoints' folder cannot be locked.
    """
    prepared = prepare(plan, store, name)
    if isinstance(prepared, PolicyResult):
        return prepared
    if prepared.balance is not None and prepared.balance.advice is not None:
        _log.warning("objective '%s': %s", name, prepared.balance.advice)
    refuse_adapter(prepared.job)
    if plan.training.method == "lora":
        require_adapters(plan.scored_as(name))  # before hours of training, not after
    final, checkpoints = store.policies / prepared.policy_id, prepared.job.checkpoints

    def say() -> None:
        _log.warning("objective '%s': waiting for another run, which trains its policy", name)

    if final.exists() and not checkpoints.exists():
        result = load_policy(final, trained=False)
    else:
        with locked(checkpoints, alone=True, waiting=say):
            if plan.training.processes > 1 and not final.exists():
                train_in_processes(plan, name, prepared.policy_id, checkpoints)
                result = load_policy(final, trained=True)
            else:
                result = train_prepared(store, prepared)
    return replace(result, selection=prepared.selection, settings=prepared.settings)


def train_prepared(store: Store, prepared: Prepared) -> PolicyResult:
    """Train here, as one process or one of several."""
    return train_policy(
        store,
        prepared.policy_id,
        prepared.job,
        prepared.correction,
        prepared.balance,
        prepared.selection,
    )


def prepare(plan: Plan, store: Store, name: str) -> Prepared | PolicyResult:
    """What an objective is trained with, read from the tables; or the policy that it keeps.

    Raises:
        TrainingError: the reference was scored in other numerics than the trainer's and the plan
            does not let it be corrected; or see `selected_pairs`.
    """
    objective = plan.objectives[name]
    # The trainer is torch, whatever engine scores the start.
    start_config = plan.trained_as(objective.start).model_copy(update={"engine": "torch"})
    planned, start = key_of(plan, store, objective.start)
    here = scorer_key(store, start_config, start)
    reference_key = None
    if objective.spec.needs_reference:
        reference_key, _ = key_of(plan, store, objective.reference)
    selected = selected_pairs(plan, store, name)
    preferences = read_preferences(store)
    training = _selected(preferences.of_splits("train"), selected)
    reference_id = None if reference_key is None else reference_key.model.model_id
    settings = settings_of(plan, store, name, here.model.model_id, reference_id)
    if (
        kept := kept_policy(plan, store, name, settings, training.read_by(objective).ids)
    ) is not None:
        found = load_policy(store.policies / kept.policy_id, trained=False)
        return replace(found, selection=selected.record, retained=kept, settings=settings)
    start_logprobs, tolerance = read_logprobs(planned), plan.scoring.tolerance(start_config.dtype)
    reference, correction = None, None
    if reference_key is not None:
        reference = read_logprobs(reference_key)
        if not reference_key.numerics.comparable(here.numerics):
            reference, correction, start_logprobs = _corrected(
                plan, store, name, start_config, start, here, reference_key, reference, training
            )
    if correction is None and not planned.numerics.comparable(here.numerics):
        tolerance = max(tolerance, _parity_tolerance(plan, objective.start))
    kl = _mismatched(store, name, training) if objective.spec.needs_kl else None
    sequences = wanted_sequences(plan, store, objective.reference)
    examples = [
        replace(example, weight=selected.weights.get(example.example_id, 1.0))
        for example in training_examples(objective, training, sequences, reference, kl)
    ]
    held_out: list[Example] = []
    if plan.training.evaluate_every is not None:
        kept_out = preferences.of_splits("test").read_by(objective)
        kept_out = kept_out.first(plan.training.evaluation_pairs, "evaluated")
        held_out = training_examples(objective, kept_out, sequences, reference, split="test")
    balance = class_balance(examples, objective.values)
    identifier = policy_id(here, reference_key, objective, plan.training, examples, held_out)
    job = Job(
        name,
        objective,
        plan.training,
        start_config,
        start,
        examples,
        held_out,
        dict(start_logprobs.select("sequence_id", "logprob").iter_rows()),
        tolerance,
        store.policies / ".checkpoints" / identifier,
    )
    return Prepared(identifier, job, correction, balance, selected.record, settings)


def _selected(preferences: Preferences, selected: Selected) -> Preferences:
    """The selected pairs, and all labels: what a plan selects by is of pairs."""
    return replace(
        preferences,
        pairs=selected.of(preferences.pairs),
        pair_sequences=selected.of(preferences.pair_sequences),
    )


def _mismatched(store: Store, name: str, training: Preferences) -> pl.DataFrame:
    """The mismatched replies of what is trained on."""
    return read(store, f"kl_sequences/{name}").filter(
        pl.col("pair_id").is_in(training.pairs["pair_id"].to_list())
        | pl.col("label_id").is_in(training.labels["label_id"].to_list())
    )


def _corrected(
    plan: Plan,
    store: Store,
    name: str,
    start_config: ModelConfig,
    start: Checkpoint,
    here: ScorerKey,
    reference_key: ScorerKey,
    reference: pl.DataFrame,
    training: Preferences,
) -> tuple[pl.DataFrame, Correction, pl.DataFrame]:
    """The reference's log-probs in the trainer's numerics, the correction, and the start's there.

    The start is scored in both numerics, as far as the ledger lacks it: only what is trained on.

    Raises:
        TrainingError: `training.reference_correction` is `never`.
    """
    objective = plan.objectives[name]
    if plan.training.reference_correction == "never":
        raise TrainingError(
            f"the reference '{objective.reference}' was scored in other numerics than the trainer "
            f"uses: {reference_key.numerics} against {here.numerics}; give both models the same "
            "dtype, engine and attention, or set training.reference_correction to auto"
        )
    sequences = _trained_on(plan, store, name, training)
    score_sequences(
        f"{objective.start} for training", here, start_config, start, sequences, plan.scoring
    )
    there_config, _ = scored_by(plan, store, objective.reference)
    there = scorer_key(store, there_config, start)
    score_sequences(
        f"{objective.start} as the reference", there, there_config, start, sequences, plan.scoring
    )
    start_here = read_logprobs(here)
    corrected, correction = correct_reference(reference, start_here, read_logprobs(there))
    return corrected, correction, start_here


def _trained_on(plan: Plan, store: Store, name: str, training: Preferences) -> pl.DataFrame:
    """The sequences training reads: what is trained on, held-out ones, mismatched replies."""
    objective = plan.objectives[name]
    ids = training.read_by(objective).sequence_ids
    if plan.training.evaluate_every is not None:
        ids += read_preferences(store).read_by(objective).of_splits("test").sequence_ids
    if objective.spec.needs_kl:
        ids += _mismatched(store, name, training)["sequence_id"].to_list()
    sequences = wanted_sequences(plan, store, objective.reference)
    return sequences.filter(pl.col("sequence_id").is_in(ids))


def _parity_tolerance(plan: Plan, model: str) -> float:
    """What two engines may differ by on the start, nats per sequence."""
    config = plan.scored_as(model)
    return 5e-3 if config.dtype == "float32" else plan.scoring.tolerance(config.dtype)
