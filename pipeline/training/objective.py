"""Training an objective of a plan: what its loss needs is gathered from the tables, or scored."""

from dataclasses import replace
from functools import partial

import polars as pl

from pipeline.errors import TrainingError
from pipeline.ids import unit_interval
from pipeline.models import Checkpoint
from pipeline.names import key_of, scored_by, wanted_sequences
from pipeline.plan import ModelConfig, Plan
from pipeline.scoring.ledger import ScorerKey, read_logprobs
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store, read
from pipeline.training.data.correction import Correction, correct_reference
from pipeline.training.data.examples import Example, training_pairs
from pipeline.training.data.selection import Selected, selected_pairs
from pipeline.training.policy import PolicyResult, load_policy, policy_id, train_policy
from pipeline.training.retrain import kept_policy, settings_of
from pipeline.training.run.loop import Job


def train_objective(plan: Plan, store: Store, name: str) -> PolicyResult:
    """Train the policy of an objective, find it trained, or keep the one it has.

    Raises:
        TrainingError: the reference was scored in other numerics than the trainer's and the plan
            does not let it be corrected; or see `selected_pairs` and `train_policy`.
    """
    objective = plan.objectives[name]
    # The trainer is torch, whatever engine scores the start.
    start_config = plan.models[objective.start].model_copy(update={"engine": "torch"})
    planned, start = key_of(plan, store, objective.start)
    here = scorer_key(store, start_config, start)
    reference_key = None
    if objective.spec.needs_reference:
        reference_key, _ = key_of(plan, store, objective.reference)
    selected = selected_pairs(plan, store, name)
    reference_id = None if reference_key is None else reference_key.model.model_id
    settings = settings_of(plan, store, name, here.model.model_id, reference_id)
    if (kept := kept_policy(plan, store, name, settings, selected)) is not None:
        found = load_policy(store.policies / kept.policy_id, trained=False)
        return replace(found, selection=selected.record, retained=kept, settings=settings)
    start_logprobs, tolerance = read_logprobs(planned), plan.scoring.tolerance(start_config.dtype)
    reference, correction = None, None
    if reference_key is not None:
        reference = read_logprobs(reference_key)
        if not reference_key.numerics.comparable(here.numerics):
            reference, correction, start_logprobs = _corrected(
                plan, store, name, start_config, start, here, reference_key, reference, selected
            )
    elif not planned.numerics.comparable(here.numerics):
        tolerance = max(tolerance, _parity_tolerance(plan, objective.start))
    kl = selected.of(read(store, f"kl_sequences/{name}")) if objective.spec.needs_kl else None
    pairs, ways = read(store, "pairs"), read(store, "pair_sequences")
    sequences = wanted_sequences(plan, store, objective.reference)
    with_strength = "strength" in objective.spec.needs
    examples = [
        replace(example, weight=selected.weights.get(example.example_id, 1.0))
        for example in training_pairs(
            selected.of(pairs), ways, sequences, reference, kl, with_strength=with_strength
        )
    ]
    held_out: list[Example] = []
    if plan.training.evaluate_every is not None:
        held_out = training_pairs(
            _held_out(pairs, ways, plan.training.evaluation_pairs),
            ways,
            sequences,
            reference,
            split="test",
            with_strength=with_strength,
        )
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
    result = train_policy(store, identifier, job, correction, selected.record)
    return replace(result, selection=selected.record, settings=settings)


def _held_out(pairs: pl.DataFrame, ways: pl.DataFrame, most: int | None) -> pl.DataFrame:
    """The tokenised pairs of the `test` split, at most so many, always the same ones."""
    test = pairs.filter(split="test").join(ways.select("pair_id"), on="pair_id", how="semi")
    if most is None:
        return test
    kept = sorted(test["pair_id"], key=partial(unit_interval, salt="evaluated"))[:most]
    return test.filter(pl.col("pair_id").is_in(kept))


def _corrected(
    plan: Plan,
    store: Store,
    name: str,
    start_config: ModelConfig,
    start: Checkpoint,
    here: ScorerKey,
    reference_key: ScorerKey,
    reference: pl.DataFrame,
    selected: Selected,
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
    sequences = _trained_on(plan, store, name, selected)
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


def _trained_on(plan: Plan, store: Store, name: str, selected: Selected) -> pl.DataFrame:
    """The sequences training reads: the selected pairs', held-out ones, mismatched replies."""
    objective = plan.objectives[name]
    wanted = pl.col("pair_id").is_in(selected.pair_ids)
    if plan.training.evaluate_every is not None:
        wanted |= pl.col("split") == "test"
    pairs = read(store, "pairs").filter(wanted)
    ways = read(store, "pair_sequences").join(pairs, on="pair_id", how="semi")
    ids = [*ways["chosen_id"], *ways["rejected_id"]]
    if objective.spec.needs_kl:
        ids += selected.of(read(store, f"kl_sequences/{name}"))["sequence_id"].to_list()
    sequences = wanted_sequences(plan, store, objective.reference)
    return sequences.filter(pl.col("sequence_id").is_in(ids))


def _parity_tolerance(plan: Plan, model: str) -> float:
    """What two engines may differ by on the start, nats per sequence."""
    config = plan.models[model]
    return 5e-3 if config.dtype == "float32" else plan.scoring.tolerance(config.dtype)
