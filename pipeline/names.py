"""What a name in a plan stands for: a model or a trained policy, how it is run, what it scores."""

import json
from functools import partial
from typing import Any

import polars as pl

from pipeline.errors import StoreError
from pipeline.ids import unit_interval
from pipeline.models import Checkpoint, policy_checkpoint, resolve
from pipeline.plan import ModelConfig, Plan
from pipeline.scoring.ledger import (
    ScorerKey,
    other_numerics,
    read_logprobs,
    recorded_difference,
)
from pipeline.scoring.passes import with_passes
from pipeline.scoring.run import scorer_key
from pipeline.store import Store, current_snapshot, read, verify
from pipeline.training.data.kl_rows import kl_sequences


def store_of(plan: Plan) -> Store:
    """Where the plan's tables are."""
    return Store(plan.store, plan.name)


def scored_by(plan: Plan, store: Store, name: str) -> tuple[ModelConfig, Checkpoint]:
    """The checkpoint behind a name and how it is run: a model's, an objective's or audit's policy.

    A policy is scored in its reference's numerics, since the two are subtracted.

    Raises:
        StoreError: the policy is not trained, or its files are gone.
    """
    if name in plan.models:
        return plan.models[name], resolve(plan.models[name], store)
    if name in plan.audits:
        audit = plan.audits[name]
        return plan.models[audit.reference], resolve(plan.models[audit.policy], store)
    objective = plan.objectives[name]
    directory = store.policies / policy_id_of(store, name)
    if not directory.exists():
        raise StoreError(f"{directory}: the policy of objective '{name}' is missing; train it")
    start = resolve(plan.models[objective.start], store)
    return plan.models[objective.reference], policy_checkpoint(start.path, directory)


def key_of(plan: Plan, store: Store, name: str) -> tuple[ScorerKey, Checkpoint]:
    """Who has scored under a name, and its checkpoint.

    In earlier numerics if the plan accepts them: then for everything that is subtracted.
    """
    config, checkpoint = scored_by(plan, store, name)
    most = plan.scoring.accept_equivalent
    earlier = None if most is None else earlier_key(plan, store, name, accepted=most)
    return earlier or scorer_key(store, config, checkpoint), checkpoint


def earlier_key(
    plan: Plan, store: Store, name: str, *, accepted: float | None = None
) -> ScorerKey | None:
    """The scorer in earlier numerics that has all that is wanted under a name, or None.

    Those that are subtracted from each other, a reference and the audits against it, come from one
    numerics: all must have what they want in it, and one of them lack something in today's.

    Args:
        plan: without objectives.
        store: with the plan's sequences.
        name: a model or an audit.
        accepted: nats per sequence; those that differ more, or were not compared, do not count.
    """
    reference = name if name in plan.models else plan.reference_of(name)
    audits = [audit for audit in plan.audits if plan.reference_of(audit) == reference]
    today = {who: scorer_key(store, *scored_by(plan, store, who)) for who in (reference, *audits)}
    wanted = {who: wanted_sequences(plan, store, who) for who in today}

    def complete(who: str, key: ScorerKey) -> bool:
        return wanted[who].join(read_logprobs(key), on="sequence_id", how="anti").is_empty()

    def usable(who: str, key: ScorerKey) -> bool:
        if not complete(who, key):
            return False
        found = recorded_difference(today[who], key)
        return accepted is None or (found is not None and found.largest <= accepted)

    if all(complete(who, key) for who, key in today.items()):
        return None
    others = {who: other_numerics(key) for who, key in today.items()}
    for candidate in others[reference]:
        found = {
            who: key
            for who, keys in others.items()
            for key in keys
            if key.numerics.comparable(candidate.numerics) and usable(who, key)
        }
        if found.keys() == today.keys():
            return found[name]
    return None


def policy_id_of(store: Store, name: str) -> str:
    """The id of the policy an objective has trained last.

    Raises:
        StoreError: none was.
    """
    return str(policy_record(store, name)["policy_id"])


def policy_record(store: Store, name: str) -> dict[str, Any]:
    """What stands about the policy an objective has trained last: its id and its settings.

    Raises:
        StoreError: none was, or the record is damaged.
    """
    pointer = current_snapshot(store, f"policies/{name}", ".json")
    verify(pointer.path, pointer.digest)
    record: dict[str, Any] = json.loads(pointer.path.read_text())
    return record


def reported_pairs(plan: Plan, store: Store) -> pl.DataFrame:
    """The pairs policies are scored and reported on, as `schemas.PairSequence`.

    All that were tokenised, or all but those of the `train` split that `scoring.train_pairs`
    leaves out.
    """
    ways = read(store, "pair_sequences")
    most = plan.scoring.train_pairs
    if most is None:
        return ways
    pairs = read(store, "pairs").filter(pl.col("split") == "train")
    train = ways.join(pairs, on="pair_id", how="semi")["pair_id"]
    out = sorted(train, key=partial(unit_interval, salt="reported"))[most:]
    return ways.filter(~pl.col("pair_id").is_in(out))


def wanted_sequences(plan: Plan, store: Store, name: str) -> pl.DataFrame:
    """What a model or policy of the plan has to score, as `schemas.Sequence` with its passes.

    The reference of a loss with a KL term scores that loss's mismatched replies too; the policy
    scores them while it is trained. A policy scores what it is reported on.
    """
    sequences = read(store, "sequences")
    if name in plan.policies:
        ways = reported_pairs(plan, store)
        sequences = sequences.filter(
            pl.col("sequence_id").is_in([*ways["chosen_id"], *ways["rejected_id"]])
        )
    kl = [
        read(store, f"kl_sequences/{objective}")
        for objective, config in plan.objectives.items()
        if config.kl_partner is not None and config.reference == name
    ]
    mismatched = [kl_sequences(table, sequences) for table in kl]
    wanted = pl.concat([sequences, *mismatched]).unique("sequence_id").sort("sequence_id")
    return with_passes(wanted, read(store, "pair_sequences"), *kl)
