"""Policy assets: one per objective."""

from typing import Any

import dagster as dg

from assets.resources import opened, resource_key
from assets.scoring import MODEL_STEP
from pipeline import stages
from pipeline.plan import Plan
from pipeline.training.data.balance import ClassBalance

GROUP = "training"


def policy(plan: Plan, name: str) -> dg.AssetsDefinition:
    """The policy an objective trains, over the cached log-probs of its reference."""
    key = dg.AssetKey([plan.name, f"policy_{name}"])
    objective = plan.objectives[name]
    models = dict.fromkeys([objective.reference, objective.start])
    start = [f"policy_{objective.start}"] if objective.start in plan.objectives else []

    @dg.asset(
        key=key,
        deps=[
            *[dg.AssetKey([plan.name, f"preference_{kind}"]) for kind in objective.kinds],
            dg.AssetKey([plan.name, "sequences"]),
            *[dg.AssetKey([plan.name, f"logprobs_{model}"]) for model in models],
            *[dg.AssetKey([plan.name, policy]) for policy in start],
        ],
        group_name=GROUP,
        kinds={"pytorch", "huggingface"},
        op_tags=MODEL_STEP,
        description=f"A policy trained from '{objective.start}' with {objective}. "
        + (
            f"The reference '{objective.reference}' is not loaded: its log-probs are in the ledger."
            if objective.spec.needs_reference
            else "The loss has no reference."
        ),
        check_specs=[dg.AssetCheckSpec("training_starts_where_the_tables_say", asset=key)],
        required_resource_keys={resource_key(plan.name)},
    )
    def trained(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        run_plan, store = opened(context, plan.name)
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
                **({} if last["kl"] is None else {"last_kl_nats": last["kl"]}),
                "directory": dg.MetadataValue.path(result.directory),
            },
            check_results=[
                dg.AssetCheckResult(
                    passed=result.first_step.passed, metadata=result.first_step.to_dict()
                )
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
