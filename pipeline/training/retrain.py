"""Whether an objective's policy is kept although there is other data (`training.retrain`).

The rule is about data alone. What the plan says of a policy (loss, values, optimiser, seed, start,
reference, their numerics, tokenisation, split, `where`, `weight`) are its settings; a change there
is always a reason to train it anew.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.names import policy_record
from pipeline.plan import Plan, selection_of
from pipeline.store import Store, read
from pipeline.training.policy import trained_examples

_log = logging.getLogger(__name__)

_HELD_OUT = ("test", "evaluation")


@dataclass(frozen=True)
class Kept:
    """A policy that is kept, and why.

    Attributes:
        policy_id: the policy.
        reason: in words.
        n_new: of what would be trained on now, pairs the policy was not trained on.
        n_now: pairs that would be trained on now.
        n_held_out: pairs the policy was trained on that are held out by now, so that what is
            reported of them flatters it.
    """

    policy_id: str
    reason: str
    n_new: int
    n_now: int
    n_held_out: int


def settings_of(
    plan: Plan, store: Store, name: str, start: str, reference: str | None
) -> dict[str, Any]:
    """What the plan says of an objective's policy, but not the data.

    Args:
        plan: the plan.
        store: with its tokenisation.
        name: the objective.
        start: the start's model id.
        reference: the reference's; None for a loss that has none.
    """
    objective, selection = plan.objectives[name], selection_of(plan, name)
    said = {
        "loss": objective.loss,
        **{f"values.{key}": value for key, value in objective.values.items()},
        "kl_partner": objective.kl_partner,
        **{f"training.{key}": value for key, value in plan.training.identity.items()},
        **{
            name: None if sql is None else sql.text
            for name, sql in (("where", selection.where), ("weight", selection.weight))
        },
        "start": start,
        "reference": reference,
        **{
            f"{role}.{key}": value
            for role in ("start", "reference")
            for key, value in plan.scored_as(getattr(objective, role))
            .model_dump(include={"engine", "dtype", "attention"})
            .items()
        },
        "tokenization": read(store, "tokenizations")["tokenization_id"][0],
        "split.salt": plan.split.salt,
        "split.test_share": plan.split.test_share,
    }
    as_recorded: dict[str, Any] = json.loads(json.dumps(said))
    return as_recorded


def kept_policy(
    plan: Plan, store: Store, name: str, settings: Mapping[str, Any], now: Sequence[str]
) -> Kept | None:
    """The policy an objective keeps, or None if its identity is to decide.

    Args:
        plan: the plan.
        store: with the objective's last policy.
        name: the objective.
        settings: the plan's.
        now: ids of the pairs and labels that would be trained on.

    Raises:
        StoreError: the list of what the last policy was trained on is damaged.
    """
    rule = plan.training.retrain
    if rule == "always" or not store.current(f"policies/{name}", ".json").is_symlink():
        return None
    last = policy_record(store, name)
    identifier = str(last["policy_id"])
    if not (store.policies / identifier).exists():
        _log.warning("objective '%s': its policy %s is gone; it is trained anew", name, identifier)
        return None
    before = last.get("settings", {})
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        _log.info("objective '%s' is not kept: %s changed", name, ", ".join(changed))
        return None
    trained_on = set(trained_examples(store, identifier)["example_id"])
    new = len(set(now) - trained_on)
    counted = f"{new} of {len(now)} pairs are new"
    if isinstance(rule, dict):
        if new >= rule["min_new_pairs"]:
            _log.info("objective '%s' is not kept: %s", name, counted)
            return None
        reason = f"{counted}, fewer than {rule['min_new_pairs']}"
    else:
        reason = f"training.retrain is never; {counted}"
    held_out = read(store, "pairs").filter(pl.col("split").is_in(_HELD_OUT))["pair_id"]
    leaked = len(trained_on & set(held_out))
    _log.info("objective '%s' keeps its policy %s: %s", name, identifier, reason)
    if leaked:
        _log.warning(
            "objective '%s': %d pairs its policy was trained on are held out by now; what is "
            "reported of held-out pairs flatters it",
            name,
            leaked,
        )
    return Kept(identifier, reason, new, len(now), leaked)
