"""Training an objective of a plan: what its loss needs is gathered from the tables, or scored."""

import logging

import polars as pl

from pipeline.errors import TrainingError
from pipeline.models import Checkpoint
from pipeline.names import key_of, scored_by, wanted_sequences
from pipeline.plan import ModelConfig, Plan
from pipeline.scoring.ledger import ScorerKey, read_logprobs
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store, read
from pipeline.training.data.balance import class_balance
from pipeline.training.data.correction import Correction, correct_reference
from pipeline.training.data.examples import Example, training_examples
from pipeline.training.data.preferences import read_preferences
from pipeline.training.policy import PolicyResult, policy_id, train_policy
from pipeline.training.run.loop import Job

_log = logging.getLogger(__name__)


def train_objective(plan: Plan, store: Store, name: str) -> PolicyResult:
    """Train the policy of an objective, or find it trained.

    Raises:
        TrainingError: the reference was scored in other numerics than the trainer's and the plan
            does not let it be corrected; or see `train_policy`.
    """
    objective = plan.objectives[name]
    # The trainer is torch, whatever engine scores the start.
    start_config = plan.trained_as(objective.start).model_copy(update={"engine": "torch"})
    planned, start = key_of(plan, store, objective.start)
    here = scorer_key(store, start_config, start)
    start_logprobs, tolerance = read_logprobs(planned), plan.scoring.tolerance(start_config.dtype)
    reference_key, reference, correction = None, None, None
    if objective.spec.needs_reference:
        reference_key, _ = key_of(plan, store, objective.reference)
        reference = read_logprobs(reference_key)
        if not reference_key.numerics.comparable(here.numerics):
            reference, correction, start_logprobs = _corrected(
                plan, store, name, start_config, start, here, reference_key, reference
            )
    if correction is None and not planned.numerics.comparable(here.numerics):
        tolerance = max(tolerance, _parity_tolerance(plan, objective.start))
    kl = read(store, f"kl_sequences/{name}") if objective.spec.needs_kl else None
    preferences = read_preferences(store)
    sequences = wanted_sequences(plan, store, objective.reference)
    examples = training_examples(objective, preferences, sequences, reference, kl)
    held_out: list[Example] = []
    if plan.training.evaluate_every is not None:
        kept = preferences.of_splits("test").read_by(objective)
        kept = kept.first(plan.training.evaluation_pairs, "evaluated")
        held_out = training_examples(objective, kept, sequences, reference, split="test")
    balance = class_balance(examples, objective.values)
    if balance is not None and balance.advice is not None:
        _log.warning("objective '%s': %s", name, balance.advice)
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
    return train_policy(store, identifier, job, correction)


def _corrected(
    plan: Plan,
    store: Store,
    name: str,
    start_config: ModelConfig,
    start: Checkpoint,
    here: ScorerKey,
    reference_key: ScorerKey,
    reference: pl.DataFrame,
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
    sequences = _trained_on(plan, store, name)
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


def _trained_on(plan: Plan, store: Store, name: str) -> pl.DataFrame:
    """The sequences training reads: its splits', and mismatched replies."""
    objective = plan.objectives[name]
    splits = ["train", "test"] if plan.training.evaluate_every is not None else ["train"]
    ids = read_preferences(store).read_by(objective).of_splits(*splits).sequence_ids
    if objective.spec.needs_kl:
        ids += read(store, f"kl_sequences/{name}")["sequence_id"].to_list()
    wanted = wanted_sequences(plan, store, objective.reference)
    return wanted.filter(pl.col("sequence_id").is_in(ids))


def _parity_tolerance(plan: Plan, model: str) -> float:
    """What two engines may differ by on the start, nats per sequence."""
    config = plan.scored_as(model)
    return 5e-3 if config.dtype == "float32" else plan.scoring.tolerance(config.dtype)
