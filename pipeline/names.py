"""What a name in a plan stands for: a model or a trained policy, how it is run, what it scores."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import StoreError
from pipeline.export.merged import merged_policy
from pipeline.ids import unit_interval
from pipeline.models import Checkpoint, identify, policy_checkpoint, resolve
from pipeline.plan import Extra, ModelConfig, Plan
from pipeline.scoring.ledger import (
    ScorerKey,
    other_numerics,
    read_complete,
    recorded_difference,
)
from pipeline.scoring.passes import with_passes
from pipeline.scoring.run import scorer_key
from pipeline.store import Store, current_snapshot, read, verify
from pipeline.training.data.kl_rows import kl_sequences
from pipeline.training.data.preferences import read_labels
from pipeline.training.record import read_record


def store_of(plan: Plan) -> Store:
    """Where the plan's tables are."""
    return Store(plan.store, plan.name)


def scored_by(plan: Plan, store: Store, name: str) -> tuple[ModelConfig, Checkpoint]:
    """The checkpoint behind a name and how it is run: a model's, an objective's or audit's policy.

    A policy is scored in its reference's numerics, since the two are subtracted. One that is
    another objective's reference or start is scored merged, as the model the other is trained from:
    an adapter that is applied rounds otherwise, and a policy that has not moved from its start must
    be exactly 0 from it. So it is one model in every role, in its own rewards too.

    Raises:
        StoreError: the policy is not trained, its files are gone, or its start is another by now.
        ModelError: it is to be merged and cannot be.
    """
    if name in plan.models:
        return plan.models[name], resolve(plan.models[name], store)
    if name in plan.audits:
        audit = plan.audits[name]
        return plan.models[audit.reference], resolve(plan.models[audit.policy], store)
    directory, start = policy_of(plan, store, name)
    if name in plan.bases:
        return plan.scored_as(name), Checkpoint(merged_policy(store, directory, start.path))
    return plan.scored_as(name), policy_checkpoint(start.path, directory)


def policy_of(plan: Plan, store: Store, name: str) -> tuple[Path, Checkpoint]:
    """Where an objective's policy is, and the model it was trained from.

    Raises:
        StoreError: the policy is not trained, its files are gone, or its start is another by now.
    """
    directory = store.policies / policy_id_of(store, name)
    if not directory.exists():
        raise StoreError(f"{directory}: the policy of objective '{name}' is missing; train it")
    _, start = scored_by(plan, store, plan.objectives[name].start)
    if read_record(directory)["start_model_id"] != identify(start, store).model_id:
        raise StoreError(
            f"{directory}: the policy of objective '{name}' was trained from another "
            f"'{plan.objectives[name].start}' than there is now; train it again"
        )
    return directory, start


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
        held = read_complete(key, wanted_extras(plan, who))
        return wanted[who].join(held, on="sequence_id", how="anti").is_empty()

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


def described(plan: Plan, store: Store, name: str) -> str:
    """What a name stands for, without the machine it is on, as records and reports have it."""
    if name in plan.objectives:
        return f"{name}: the policy {policy_id_of(store, name)}"
    checkpoint = plan.models[name].checkpoint
    return f"{name}: {Path(checkpoint).name if Path(checkpoint).exists() else checkpoint}"


def reported_pairs(plan: Plan, store: Store) -> pl.DataFrame:
    """The pairs policies are scored and reported on, as `schemas.PairSequence`.

    All that were tokenised, or all but those of the `train` split that `scoring.train_pairs`
    leaves out.
    """
    return _reported(plan, read(store, "pair_sequences"), read(store, "pairs"), "pair_id")


def _reported(plan: Plan, ways: pl.DataFrame, table: pl.DataFrame, key: str) -> pl.DataFrame:
    most = plan.scoring.train_pairs
    if most is None:
        return ways
    train = ways.join(table.filter(pl.col("split") == "train"), on=key, how="semi")[key]
    out = sorted(train, key=partial(unit_interval, salt="reported"))[most:]
    return ways.filter(~pl.col(key).is_in(out))


def wanted_sequences(plan: Plan, store: Store, name: str) -> pl.DataFrame:
    """What a model or policy of the plan has to score, as `schemas.Sequence` with its passes.

    The reference of a loss with a KL term scores that loss's mismatched replies too; the policy
    scores them while it is trained. A policy scores the pairs it is reported on, and the labels if
    it could be trained on any; one that is another's reference or start all that a model scores.
    """
    sequences, labels = read(store, "sequences"), read_labels(store, "label_sequences")
    if name in plan.policies and name not in plan.bases:
        ways = reported_pairs(plan, store)
        ids = [*ways["chosen_id"], *ways["rejected_id"]]
        if name in plan.objectives and plan.objectives[name].reads_labels:
            table = read_labels(store, "labels")
            ids += _reported(plan, labels, table, "label_id")["sequence_id"].to_list()
        sequences = sequences.filter(pl.col("sequence_id").is_in(ids))
    kl = [
        read(store, f"kl_sequences/{objective}")
        for objective, config in plan.objectives.items()
        if config.kl_partner is not None and config.reference == name
    ]
    mismatched = [kl_sequences(table, sequences) for table in kl]
    wanted = pl.concat([sequences, *mismatched]).unique("sequence_id").sort("sequence_id")
    return with_passes(wanted, read(store, "pair_sequences"), *kl, labels=labels)


def wanted_extras(plan: Plan, name: str) -> list[Extra]:
    """What a policy is scored for beside log-probs; a model of the plan is for nothing."""
    return plan.scoring.token_extras if name in plan.policies else []
