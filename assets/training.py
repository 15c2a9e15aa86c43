"""Policy assets: one per objective."""

from collections.abc import Collection
from typing import Any

import dagster as dg

from assets.resources import opened, resource_key
from assets.scoring import MODEL_STEP
from pipeline import stages
from pipeline.errors import PlanError
from pipeline.plan import Plan, policies_named, selection_of
from pipeline.training.data.balance import ClassBalance
from pipeline.training.policy import PolicyResult

GROUP = "training"
UNSEEN = "held_out_pairs_were_not_trained_on"


def policy(plan: Plan, name: str) -> dg.AssetsDefinition:
    """The policy an objective trains, over the cached log-probs of its reference."""
    key = dg.AssetKey([plan.name, f"policy_{name}"])
    objective = plan.objectives[name]
    models = dict.fromkeys([objective.reference, objective.start])
    start = [f"policy_{objective.start}"] if objective.start in plan.objectives else []
    selecting = policies_named(plan, name)
    checks = ["training_starts_where_the_tables_say"]
    if plan.training.retrain != "always":
        checks.append(UNSEEN)

    @dg.asset(
        key=key,
        deps=[
            *[dg.AssetKey([plan.name, f"preference_{kind}"]) for kind in objective.kinds],
            dg.AssetKey([plan.name, "sequences"]),
            *[dg.AssetKey([plan.name, f"logprobs_{model}"]) for model in models],
            *[dg.AssetKey([plan.name, policy]) for policy in start],
            *[dg.AssetKey([plan.name, f"implicit_rewards_{policy}"]) for policy in selecting],
        ],
        group_name=GROUP,
        kinds={"pytorch", "huggingface"},
        op_tags=MODEL_STEP,
        description=f"A policy trained from '{objective.start}' with {objective}. "
        + (
            f"The reference '{objective.reference}' is not loaded: its log-probs are in the ledger."
            if objective.spec.needs_reference
            else "The loss has no reference."
        )
        + "".join(f" {sql.key}: {sql.text}." for sql in selection_of(plan, name).expressions),
        check_specs=[dg.AssetCheckSpec(check, asset=key) for check in checks],
        required_resource_keys={resource_key(plan.name)},
    )
    def trained(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        run_plan, store = opened(context, plan.name)
        _require_lineage(run_plan, name, selecting)
        result = stages.train(run_plan, store, name)
        ran = run_plan.objectives[name]
        target = ran.spec.target(ran.values)
        first, last = result.steps.row(0, named=True), result.steps.row(-1, named=True)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.policy_id),
            metadata={
                "policy_id": result.policy_id,
                "trained": result.trained,
                "objective": str(ran),
                **({} if target is None else {"target": str(target), "target_nats": target.nats}),
                **(
                    {}
                    if result.correction is None
                    else {
                        "reference_correction_max_nats": result.correction.largest,
                        "reference_correction_mean_nats": result.correction.mean,
                    }
                ),
                **({} if result.balance is None else _balance(result.balance)),
                "steps": result.steps.height,
                "first_loss": first["loss"],
                "last_loss": last["loss"],
                "first_accuracy": first["rewards/accuracies"],
                "last_accuracy": last["rewards/accuracies"],
                "last_margin": last["rewards/margins"],
                "tokens": last["num_tokens"],
                **_data_metadata(result),
                **({} if last["kl"] is None else {"last_kl_nats": last["kl"]}),
                "directory": dg.MetadataValue.path(result.directory),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name=checks[0],
                    passed=result.first_step.passed,
                    metadata=result.first_step.to_dict(),
                ),
                *[_unseen(result) for check in checks if check == UNSEEN],
            ],
        )

    return trained


def _balance(balance: ClassBalance) -> dict[str, Any]:
    """The rows of either class, and how they stand under the loss's weights."""
    return {
        "rows_desirable": balance.n_desirable,
        "rows_undesirable": balance.n_undesirable,
        **({} if balance.ratio is None else {"class_ratio": balance.ratio}),
        **({} if balance.advice is None else {"class_advice": balance.advice}),
    }


def _require_lineage(run_plan: Plan, name: str, selecting: Collection[str]) -> None:
    """Refuse a run whose overrides read rewards that the graph does not make before training."""
    beside = [policy for policy in policies_named(run_plan, name) if policy not in selecting]
    if beside:
        key = selection_of(run_plan, name).expressions[0].key
        raise PlanError(
            f"{key}: an override names the rewards of {', '.join(beside)}, which this graph does "
            "not compute before it trains; write it into the plan's file"
        )


def _data_metadata(result: PolicyResult) -> dict[str, Any]:
    """How many pairs were selected, and why a policy was kept."""
    said: dict[str, Any] = {"kept": result.retained is not None}
    if (record := result.selection) is not None:
        said |= {
            "selection": str(record),
            "pairs_selected": record.n_selected,
            "pairs_left_out": record.n_left_out,
            "pairs_null": record.n_null,
            **{f"pairs_without/{name}": n for name, n in record.null_in.items()},
        }
    if (kept := result.retained) is not None:
        said |= {"kept_because": kept.reason, "pairs_new": kept.n_new}
    return said


def _unseen(result: PolicyResult) -> dg.AssetCheckResult:
    """Whether a kept policy was trained on pairs that are held out by now."""
    n = 0 if result.retained is None else result.retained.n_held_out
    return dg.AssetCheckResult(
        check_name=UNSEEN,
        passed=n == 0,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"pairs": n},
    )
