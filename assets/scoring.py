"""Log-prob assets: one per model and per trained policy."""

import dagster as dg

from assets.metadata import column_schema
from assets.resources import opened, resource_key
from pipeline import stages
from pipeline.plan import Plan
from schemas import LogProb

GROUP = "scoring"
MODEL_TAG = "logratio/model"
MODEL_STEP = {MODEL_TAG: "true"}
"""Tag of steps that load a model; a job runs as many of them at a time as its plan says."""


def logprobs(plan: Plan, name: str) -> dg.AssetsDefinition:
    """The log-probs of every sequence under a model of the plan, or of a policy's pairs."""
    key = dg.AssetKey([plan.name, f"logprobs_{name}"])
    deps = [dg.AssetKey([plan.name, "sequences"])]
    if name in plan.objectives:
        deps.append(dg.AssetKey([plan.name, f"policy_{name}"]))
    library = "vllm" if plan.scored_as(name).engine == "vllm" else "pytorch"

    @dg.asset(
        key=key,
        deps=deps,
        group_name=GROUP,
        kinds={library, "parquet"},
        op_tags=MODEL_STEP,
        description="One row is a scored sequence: the sum over its completion's tokens, nats.",
        metadata={"dagster/column_schema": column_schema(LogProb)},
        check_specs=[
            dg.AssetCheckSpec("every_sequence_is_scored", asset=key, blocking=True),
            dg.AssetCheckSpec("logprobs_are_finite", asset=key, blocking=True),
            dg.AssetCheckSpec("scoring_is_repeatable", asset=key, blocking=True),
        ],
        required_resource_keys={resource_key(plan.name)},
    )
    def scored(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        # Every other step that holds a model waits for the models.
        at_once = len(plan.scored_models) if name in plan.models else None
        run_plan, store = opened(context, plan.name, at_once)
        result = stages.score(run_plan, store, name)
        table = stages.scored_rows(run_plan, store, name, result.key)
        test = result.null_test
        return dg.MaterializeResult(
            data_version=dg.DataVersion(table.digest),
            metadata={
                "dagster/row_count": table.n_rows,
                "rows_scored": result.n_scored,
                "rows_reused": result.n_reused,
                "rows_unscored": result.n_unscored,
                "model_loaded": result.model_loaded,
                "tokens_scored": result.n_tokens,
                "tokens_per_second": result.tokens_per_second,
                "seconds": result.seconds,
                "mean_logprob_nats": table.mean,
                "noise_floor_nats": test.noise_floor,
                "model_id": result.key.model.model_id,
                "numerics_id": result.key.numerics.numerics_id,
                "engine": f"{result.key.numerics.engine} {result.key.numerics.engine_version}, "
                f"{result.key.numerics.runner}, {result.key.numerics.body_dtype}",
                "ledger": dg.MetadataValue.path(result.key.directory),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="every_sequence_is_scored",
                    passed=table.n_rows == result.n_wanted,
                    metadata={
                        "wanted": result.n_wanted,
                        "held": table.n_rows,
                        **({"unscored": table.unscored} if table.unscored else {}),
                    },
                ),
                dg.AssetCheckResult(
                    check_name="logprobs_are_finite",
                    passed=table.n_nonfinite == 0,
                    metadata={"not_finite": table.n_nonfinite},
                ),
                dg.AssetCheckResult(
                    check_name="scoring_is_repeatable", passed=test.passed, metadata=test.to_dict()
                ),
            ],
        )

    return scored
