"""Reward and report assets: one each per policy."""

from typing import Any

import dagster as dg

from assets.metadata import column_schema, png_markdown, table_metadata
from assets.resources import opened, resource_key
from assets.scoring import MODEL_STEP
from pipeline import stages
from pipeline.parity import engine_parity
from pipeline.plan import Plan
from schemas import AlignedReward, LossLandscape, Reward

GROUP = "report"
PARTS = ["rows", "pairs", "splits", "baselines", "training", "noise", "finite"]
"""The parts of a report's numbers that go to Dagster too: counts and statistics, no text."""


def implicit_rewards(plan: Plan, name: str) -> dg.AssetsDefinition:
    """The table every analysis starts from."""
    key = dg.AssetKey([plan.name, f"implicit_rewards_{name}"])
    reference = dg.AssetKey([plan.name, f"logprobs_{plan.reference_of(name)}"])
    policy = dg.AssetKey([plan.name, f"logprobs_{name}"])
    lineage = {
        **{f"ref_{side}": reference for side in ("chosen", "rejected")},
        **{f"policy_{side}": policy for side in ("chosen", "rejected")},
    }

    aligned = "log_sum_squares" in plan.scoring.token_extras

    @dg.asset(
        key=key,
        deps=[
            dg.AssetKey([plan.name, "preference_pairs"]),
            dg.AssetKey([plan.name, "sequences"]),
            *_trained(plan, name),
            reference,
            policy,
        ],
        group_name=GROUP,
        kinds={"polars", "parquet"},
        description="One row is a preference pair under one policy: log-ratios, rewards, margin.",
        metadata={
            "dagster/column_schema": column_schema(AlignedReward if aligned else Reward),
            "dagster/column_lineage": dg.TableColumnLineage(
                {
                    column: [dg.TableColumnDep(asset_key=source, column_name="logprob")]
                    for column, source in lineage.items()
                }
            ),
        },
        check_specs=[dg.AssetCheckSpec("every_reported_pair_has_a_reward", asset=key)],
        required_resource_keys={resource_key(plan.name)},
    )
    def rewarded(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        run_plan, store = opened(context, plan.name)
        table = stages.compute_rewards(run_plan, store, name)
        wanted = stages.n_reported(run_plan, store)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(table.digest),
            metadata=table_metadata(table, f"rewards/{name}"),
            check_results=[
                dg.AssetCheckResult(
                    passed=table.n_rows == wanted,
                    metadata={"reported": wanted, "rewards": table.n_rows},
                )
            ],
        )

    return rewarded


def engines_agree(plan: Plan, name: str) -> list[dg.AssetChecksDefinition]:
    """A step that scores a policy's pairs with the plan's second engine, if it has one."""
    parity = plan.scoring.parity
    if parity is None or name not in (parity.policies or plan.policies):
        return []

    @dg.asset_check(
        asset=dg.AssetKey([plan.name, f"implicit_rewards_{name}"]),
        name="engines_agree",
        description=f"Log-ratios of the {parity.split} pairs are the same when {parity.engine} "
        "scores them, but for noise.",
        op_tags=MODEL_STEP,
        required_resource_keys={resource_key(plan.name)},
    )
    def compared(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        result = engine_parity(*opened(context, plan.name), name)
        return dg.AssetCheckResult(passed=result.passed, metadata=result.to_dict())

    return [compared]


def reward_report(plan: Plan, name: str) -> dg.AssetsDefinition:
    """The page a person reads, and its numbers as JSON and as metadata."""

    @dg.asset(
        key=[plan.name, f"reward_report_{name}"],
        deps=[
            dg.AssetKey([plan.name, f"implicit_rewards_{name}"]),
            dg.AssetKey([plan.name, "preference_pairs"]),
            dg.AssetKey([plan.name, "quarantined_rows"]),
            *_trained(plan, name),
        ],
        group_name=GROUP,
        kinds={"html", "json"},
        description="Accuracy, margins, training curve, best and worst pairs, on one page.",
        required_resource_keys={resource_key(plan.name)},
    )
    def reported(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        result = stages.write_report(*opened(context, plan.name), name)
        return dg.MaterializeResult(
            metadata={
                "report": dg.MetadataValue.path(result.html),
                "json": dg.MetadataValue.path(result.json),
                "margins": png_markdown(result.rendered.histogram_png, "histogram of margins"),
                **_flat({part: result.rendered.numbers[part] for part in PARTS}),
            },
        )

    return reported


def loss_landscape(plan: Plan) -> dg.AssetsDefinition:
    """What many losses would make of the plan's policies; nothing is trained for it."""

    @dg.asset(
        key=[plan.name, "loss_landscape"],
        deps=[
            dg.AssetKey([plan.name, "preference_pairs"]),
            *[dg.AssetKey([plan.name, f"implicit_rewards_{name}"]) for name in plan.policies],
        ],
        group_name=GROUP,
        kinds={"polars", "parquet"},
        description="Fixed policies as many losses see them, not a retraining study: one row is a "
        "loss with one setting, its mean loss and its gradient weights over a policy's cached "
        "log-probs.",
        metadata={"dagster/column_schema": column_schema(LossLandscape)},
        required_resource_keys={resource_key(plan.name)},
    )
    def landscape(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        result = stages.compute_landscape(*opened(context, plan.name))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.table.digest),
            metadata={
                **table_metadata(result.table, "loss_landscape"),
                "losses": ", ".join(result.losses),
                "figure": png_markdown(result.png, "effective share of the pairs over beta"),
            },
        )

    return landscape


def _trained(plan: Plan, name: str) -> list[dg.AssetKey]:
    """The policy's asset, unless it was trained elsewhere."""
    return [dg.AssetKey([plan.name, f"policy_{name}"])] if name in plan.objectives else []


def _flat(numbers: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The report's numbers, one metadata entry each; Dagster plots them over time."""
    entries: dict[str, Any] = {}
    for key, value in numbers.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            entries.update(_flat(value, f"{name}/"))
        elif isinstance(value, bool | int | float):
            entries[name] = value
    return entries
