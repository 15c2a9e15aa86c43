"""Rewards to reports."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.names import (
    described,
    key_of,
    policy_id_of,
    reported_pairs,
)
from pipeline.plan import ObjectiveConfig, Plan, selection_of
from pipeline.report import RenderedReport, ReportInput, render
from pipeline.stages.common import limited, noise_floor
from pipeline.store import (
    Snapshot,
    Store,
    current_snapshot,
    publish_file,
    read,
)
from pipeline.training.policy import trained_examples
from schemas import (
    TrainingStep,
    polars_schema,
)


@dataclass(frozen=True)
class ReportResult:
    """The published page and JSON, and what they say."""

    html: Path
    json: Path
    rendered: RenderedReport


def n_reported(plan: Plan, store: Store) -> int:
    """How many pairs policies are reported on, and so must have a reward."""
    return reported_pairs(plan, store).height


def write_report(plan: Plan, store: Store, name: str) -> ReportResult:
    """The report of an objective's or an audit's policy, as HTML and JSON."""
    against = plan.reference_of(name)
    reference, _ = key_of(plan, store, against)
    policy, _ = key_of(plan, store, name)
    pairs, rewards = read(store, "pairs"), read(store, f"rewards/{name}")
    ways = read(store, "pair_sequences")
    identities = {
        "plan": plan.name,
        "plan digest": plan.digest,
        "pairs": current_snapshot(store, "pairs").digest,
        "rewards": current_snapshot(store, f"rewards/{name}").digest,
        "tokenisation": read(store, "tokenizations")["tokenization_id"][0],
        "reference": described(plan, store, against),
        "reference model id": reference.model.model_id,
        "policy model id": policy.model.model_id,
        "numerics id": reference.numerics.numerics_id,
        "engine": f"{reference.numerics.engine} {reference.numerics.engine_version}, "
        f"{reference.numerics.body_dtype}, {reference.numerics.device_class}",
    }
    if name in plan.audits:
        identities["policy"] = described(plan, store, plan.audits[name].policy)
        loss, has_reference = {}, True
        steps = pl.DataFrame(schema=polars_schema(TrainingStep))
    else:
        identities |= {"policy id": policy_id_of(store, name), "seed": str(plan.training.seed)}
        objective = plan.objectives[name]
        identities["start"] = described(plan, store, objective.start)
        loss, has_reference = _loss(objective), objective.spec.needs_reference
        steps = read(store, f"training_steps/{name}")
    left_out = pairs.height - limited(pairs, plan.limit_pairs).height
    left_out += ways.height - reported_pairs(plan, store).height
    rendered = render(
        ReportInput(
            title=f"{name}: implicit rewards",
            plan=plan.name,
            objective=name,
            loss=loss,
            has_reference=has_reference,
            rewards=rewards,
            pairs=pairs,
            rows=read(store, "rows"),
            quarantine=read(store, "quarantine"),
            untokenized=read(store, "untokenized_pairs"),
            training_steps=steps,
            training_pairs=_fitted(plan, store, name, pairs, ways),
            provenance=identities,
            noise_floor=noise_floor(reference, policy),
            n_left_out=left_out,
        )
    )
    html = publish_file(store, f"reports/{name}", rendered.html.encode(), ".html")
    numbers = publish_file(store, f"reports/{name}", rendered.json.encode(), ".json")
    return ReportResult(_pointer(store, name, html), _pointer(store, name, numbers), rendered)


def _fitted(
    plan: Plan, store: Store, name: str, pairs: pl.DataFrame, ways: pl.DataFrame
) -> pl.DataFrame:
    """What the report's baselines learn from: what the policy did, if pairs were selected."""
    found = pairs.filter(split="train").join(ways, on="pair_id", how="semi")
    if name in plan.audits or selection_of(plan, name).where is None:
        return found
    trained = trained_examples(store, policy_id_of(store, name))
    return found.join(trained, left_on="pair_id", right_on="example_id", how="semi")


def _loss(objective: ObjectiveConfig) -> dict[str, str]:
    """What a policy was trained with, as a report shows it."""
    target = objective.spec.target(objective.values)
    return {
        "loss": objective.spec.name,
        **{key: f"{value:g}" for key, value in objective.values.items()},
        "target": "none, it always asks for more" if target is None else str(target),
        "paper": objective.spec.paper,
    }


def _pointer(store: Store, name: str, snapshot: Snapshot) -> Path:
    return store.current(f"reports/{name}", snapshot.path.suffix)
