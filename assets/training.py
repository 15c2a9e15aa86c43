"""Policy assets: one per objective."""

import dagster as dg

from assets.resources import opened, resource_key
from assets.scoring import MODEL_STEP
from pipeline import stages
from pipeline.plan import Plan

GROUP = "training"


def policy(plan: Plan, name: str) -> dg.AssetsDefinition:
    """The policy an objective trains, over the cached log-probs of its reference."""
    key = dg.AssetKey([plan.name, f"policy_{name}"])
    objective = plan.objectives[name]
    models = dict.fromkeys([objective.reference, objective.start])

    @dg.asset(
        key=key,
        deps=[
            dg.AssetKey([plan.name, "preference_pairs"]),
            dg.AssetKey([plan.name, "sequences"]),
            *[dg.AssetKey([plan.name, f"logprobs_{model}"]) for model in models],
        ],
        group_name=GROUP,
        kinds={"pytorch", "huggingface"},
        op_tags=MODEL_STEP,
        description=f"A policy trained with {objective.loss} from '{objective.start}' against "
        f"'{objective.reference}', which is not loaded: its log-probs are in the ledger.",
        check_specs=[dg.AssetCheckSpec("training_starts_where_the_tables_say", asset=key)],
        required_resource_keys={resource_key(plan.name)},
    )
    def trained(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        result = stages.train(*opened(context, plan.name), name)
        first, last = result.steps.row(0, named=True), result.steps.row(-1, named=True)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.policy_id),
            metadata={
                "policy_id": result.policy_id,
                "trained": result.trained,
                "steps": result.steps.height,
                "first_loss": first["loss"],
                "last_loss": last["loss"],
                "first_accuracy": first["rewards/accuracies"],
                "last_accuracy": last["rewards/accuracies"],
                "last_margin": last["rewards/margins"],
                "tokens": last["num_tokens"],
                "directory": dg.MetadataValue.path(result.directory),
            },
            check_results=[
                dg.AssetCheckResult(
                    passed=result.first_step.passed, metadata=result.first_step.to_dict()
                )
            ],
        )

    return trained
