"""Log-probs to policies, their rewards and what other losses make of them."""

import json
from dataclasses import dataclass

import polars as pl

from pipeline.landscape import answerable, landscape, landscape_png
from pipeline.losses import REGISTRY
from pipeline.names import (
    key_of,
    policy_id_of,
    reported_pairs,
    wanted_extras,
)
from pipeline.plan import Plan
from pipeline.rewards import reward_table
from pipeline.scoring.ledger import (
    read_extras,
    read_logprobs,
)
from pipeline.stages.common import noise_floor
from pipeline.store import (
    Store,
    TableSnapshot,
    current_snapshot,
    publish,
    publish_file,
    read,
)
from pipeline.training.objective import train_objective
from pipeline.training.policy import PolicyResult
from schemas import (
    AlignedReward,
    LossLandscape,
    Reward,
    TrainingEvaluation,
    TrainingStep,
    polars_schema,
)


@dataclass(frozen=True)
class LandscapeResult:
    """The published table, which losses are in it, and a picture."""

    table: TableSnapshot
    losses: list[str]
    png: bytes


def train(plan: Plan, store: Store, name: str) -> PolicyResult:
    """Train the policy of an objective, find it trained, or keep the one it has.

    Publishes its training steps, and a pointer to it with the settings it was trained with.
    """
    result = train_objective(plan, store, name)
    publish(store, f"training_steps/{name}", result.steps, TrainingStep)
    publish(store, f"training_evaluations/{name}", result.evaluations, TrainingEvaluation)
    record = {"policy_id": result.policy_id, "settings": result.settings}
    pointer = json.dumps(record, sort_keys=True).encode()
    publish_file(store, f"policies/{name}", pointer, ".json")
    return result


def compute_rewards(plan: Plan, store: Store, name: str) -> TableSnapshot:
    """The implicit rewards of an objective's or an audit's policy against its reference."""
    reference, _ = key_of(plan, store, plan.reference_of(name))
    policy, _ = key_of(plan, store, name)
    statistics: dict[str, float] = {}
    if name in plan.audits:
        # Whatever it was trained with, it is looked at as DPO sees it.
        spec, values, identifier = (
            REGISTRY["dpo"],
            {"beta": plan.report.beta},
            policy.model.model_id,
        )
    else:
        objective = plan.objectives[name]
        spec, values, identifier = objective.spec, objective.values, policy_id_of(store, name)
        # KTO's weights depend on a reference point; the one the policy was last trained with.
        if (last := read(store, f"training_steps/{name}")["kl"][-1]) is not None:
            statistics["kl"] = last
    aligned = "log_sum_squares" in wanted_extras(plan, name)
    table = reward_table(
        read(store, "pairs"),
        reported_pairs(plan, store),
        read_logprobs(reference),
        read_logprobs(policy),
        beta=plan.report.beta,
        spec=spec,
        values=values,
        statistics=statistics,
        policy_id=identifier,
        pairs_digest=current_snapshot(store, "pairs").digest,
        noise_floor=noise_floor(reference, policy),
        extras=read_extras(policy) if aligned else None,
    )
    return publish(store, f"rewards/{name}", table, AlignedReward if aligned else Reward)


def compute_landscape(plan: Plan, store: Store) -> LandscapeResult:
    """Every policy of the plan, as it is, under the losses and settings the plan asks for.

    KTO is asked only where the policy's training has measured its reference point, WPO only where
    policies are scored with `log_sum_squares` (`scoring.token_extras`).

    Raises:
        LossInputError: a loss the plan names needs numbers that the tables do not have.
    """
    config = plan.report.landscape
    strengths = read(store, "pairs").select("pair_id", "strength")
    tables = [pl.DataFrame(schema=polars_schema(LossLandscape))]
    for name in plan.policies:
        rewards = read(store, f"rewards/{name}").join(strengths, on="pair_id", how="left")
        if rewards.is_empty():  # trained on labels alone, and asked about no pair
            continue
        if rewards["strength"].null_count():
            rewards = rewards.drop("strength")
        known: dict[str, float] = {}
        if name in plan.objectives and plan.objectives[name].spec.needs_kl:
            known["kl"] = read(store, f"training_steps/{name}")["kl"][-1]
        asked = config.losses or answerable(rewards.columns, known)
        grid = {
            parameter: values
            for parameter, values in config.grid.items()
            if any(parameter in REGISTRY[loss].parameters for loss in asked)
        }
        found = landscape(rewards, asked, grid, statistics=known)
        ids = {
            "policy": name,
            "policy_id": rewards["policy_id"].first(),
            "rewards_digest": current_snapshot(store, f"rewards/{name}").digest,
        }
        tables.append(found.select(*(pl.lit(v).alias(k) for k, v in ids.items()), pl.all()))
    table = pl.concat(tables)
    own = [o.loss for o in plan.objectives.values() if isinstance(o.loss, str)]
    losses = table["loss"].unique(maintain_order=True).to_list()
    png = landscape_png(table, list(dict.fromkeys([*own, "dpo", "ipo", "simpo", *losses])))
    return LandscapeResult(publish(store, "loss_landscape", table, LossLandscape), losses, png)
