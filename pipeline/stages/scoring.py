"""Sequences to log-probs in the ledger."""

from dataclasses import dataclass, replace
from functools import partial

import polars as pl

from pipeline.errors import ScoringError
from pipeline.ids import content_id, unit_interval
from pipeline.names import (
    earlier_key,
    scored_by,
    wanted_extras,
    wanted_sequences,
)
from pipeline.plan import Plan
from pipeline.scoring.ledger import (
    ScorerKey,
    read_complete,
    read_extras,
    read_unscored,
    recorded_difference,
    scorers,
)
from pipeline.scoring.run import ScoringResult, score_sequences, scorer_key
from pipeline.store import (
    Store,
    publish,
)
from schemas import (
    Scorer,
)

_SHOWN = 20
"""Sequences that are named where many could be."""


@dataclass(frozen=True)
class ScoredRows:
    """What the ledger holds of the plan's sequences under one scorer.

    Attributes:
        n_rows: sequences.
        n_nonfinite: of them, those whose log-prob is not finite.
        mean: of the others, nats.
        digest: content id of ids and log-probs.
        unscored: the first of those that were tried in vain, each with what the engine said.
    """

    n_rows: int
    n_nonfinite: int
    mean: float
    digest: str
    unscored: dict[str, str]


def score(plan: Plan, store: Store, name: str) -> ScoringResult:
    """Score what is wanted of a model or a trained policy of the plan.

    Raises:
        ScoringError: there is nothing to score; or see `score_sequences`.
    """
    config, checkpoint = scored_by(plan, store, name)
    sequences = wanted_sequences(plan, store, name)
    if sequences.is_empty():
        raise ScoringError(
            f"'{name}' has nothing to score: no pair was tokenised, nor a label that it reads"
        )
    result = None
    if plan.scoring.accept_equivalent is not None:
        result = _reused(plan, store, name, sequences, plan.scoring.accept_equivalent)
    if result is None:
        key = scorer_key(store, config, checkpoint)
        result = score_sequences(
            name,
            key,
            config,
            checkpoint,
            sequences,
            plan.scoring,
            extras=wanted_extras(plan, name),
        )
    publish(store, "scorers", scorers(store.ledger), Scorer)
    return result


def _reused(
    plan: Plan, store: Store, name: str, sequences: pl.DataFrame, most: float
) -> ScoringResult | None:
    """What earlier numerics hold, if a sample scored today differs by at most `most` nats.

    Where an audit's does not, its reference is scored in today's numerics as well, for its own
    sample may have been close enough.
    """
    config, checkpoint = scored_by(plan, store, name)
    key = scorer_key(store, config, checkpoint)
    earlier = earlier_key(plan, store, name)
    if earlier is not None:
        ids = sorted(sequences["sequence_id"], key=partial(unit_interval, salt="equivalent"))
        sample = sequences.filter(pl.col("sequence_id").is_in(ids[: plan.scoring.null_test_rows]))
        result = score_sequences(f"{name}, a sample", key, config, checkpoint, sample, plan.scoring)
        found = recorded_difference(key, earlier)
        if found is not None and found.largest <= most:
            n = sequences.height
            return replace(result, key=earlier, n_wanted=n, n_reused=n, n_scored=0, n_unscored=0)
    if name in plan.audits:
        against = plan.reference_of(name)
        reference, base = scored_by(plan, store, against)
        key = scorer_key(store, reference, base)
        score_sequences(against, key, reference, base, sequences, plan.scoring)
    return None


def scored_rows(plan: Plan, store: Store, name: str, key: ScorerKey) -> ScoredRows:
    """Read the ledger back and say what it holds of the sequences that were wanted.

    A sequence that lacks an extra the plan wants is not held.
    """
    wanted = wanted_sequences(plan, store, name).select("sequence_id")
    extras = wanted_extras(plan, name)
    tried = read_unscored(key, extras).join(wanted, on="sequence_id", how="semi").head(_SHOWN)
    held = read_complete(key, extras).join(wanted, on="sequence_id", how="semi")
    held = held.sort("sequence_id")
    said = [held["sequence_id"].to_list(), held["logprob"].to_list()]
    if extras:
        of_extras = read_extras(key).filter(pl.col("extra").is_in(extras))
        of_extras = of_extras.join(held, on="sequence_id", how="semi").sort("sequence_id", "extra")
        said += [of_extras["extra"].to_list(), of_extras["total"].to_list()]
    finite = held.filter(pl.col("logprob").is_finite())
    return ScoredRows(
        n_rows=held.height,
        n_nonfinite=held.height - finite.height,
        mean=float(finite["logprob"].sum()) / max(finite.height, 1),
        digest=content_id("scored", *said),
        unscored={
            row["sequence_id"]: f"{row['rule']}: {row['detail']}"
            for row in tried.iter_rows(named=True)
        },
    )
