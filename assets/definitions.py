"""The code location: every plan's assets and its job.

`LOGRATIO_PLANS` names the plan files, separated by the system's path separator; without it, every
YAML file in `plans/` is one.
"""

import os
from pathlib import Path
from typing import Any

import dagster as dg

from assets import intake, report, scoring, training
from assets.resources import PlanResource, resource_key
from assets.scoring import MODEL_TAG
from pipeline.errors import PlanError
from pipeline.plan import Plan, load_plan

PLANS_VARIABLE = "LOGRATIO_PLANS"
PROJECT = Path(__file__).resolve().parent.parent

_STEPS_IMPORT = ("assets.definitions", "pipeline.intake", "pipeline.stages")
"""Imported once for all steps of a run. torch is not: a step says first how many cores it takes."""


def plan_files() -> list[Path]:
    """The plan files this code location serves."""
    if named := os.environ.get(PLANS_VARIABLE):
        return [Path(path) for path in named.split(os.pathsep)]
    return sorted((PROJECT / "plans").glob("*.yaml"))


def plan_definitions(path: Path) -> dg.Definitions:
    """One plan's assets, job and resource.

    Raises:
        pipeline.errors.PlanError: the plan is wrong.
    """
    plan = load_plan(path)
    assets = [
        intake.raw_preferences(plan),
        intake.preference_pairs(plan),
        intake.sequences(plan),
        *[scoring.logprobs(plan, name) for name in (*plan.scored_models, *plan.policies)],
    ]
    for name in plan.objectives:
        assets.append(training.policy(plan, name))
    for name in plan.policies:
        assets += [report.implicit_rewards(plan, name), report.reward_report(plan, name)]
    if plan.policies:
        assets.append(report.loss_landscape(plan))
    return dg.Definitions(
        assets=assets,
        asset_checks=[
            check for name in plan.policies for check in report.engines_agree(plan, name)
        ],
        jobs=[job(plan, assets)],
        resources={resource_key(plan.name): PlanResource(path=str(path.resolve()))},
    )


def job_name(plan: Plan) -> str:
    """The job that runs all of a plan."""
    return f"{plan.name}_job"


def job(plan: Plan, assets: list[dg.AssetsDefinition]) -> Any:
    """Everything from the sources to the reports; `model_steps` models are in memory at a time."""
    return dg.define_asset_job(
        job_name(plan),
        selection=dg.AssetSelection.assets(
            *[key for definition in assets for key in definition.keys]
        ),
        description=f"Runs the plan '{plan.name}' from its sources to its reports.",
        executor_def=dg.multiprocess_executor.configured(
            {
                "max_concurrent": plan.model_steps + 1,
                "tag_concurrency_limits": [{"key": MODEL_TAG, "limit": plan.model_steps}],
                "start_method": {"forkserver": {"preload_modules": list(_STEPS_IMPORT)}},
            }
        ),
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster loads."""
    files = plan_files()
    if not files:
        raise PlanError(f"no plan: set {PLANS_VARIABLE}, or put a YAML file into plans/")
    return dg.Definitions.merge(*[plan_definitions(path) for path in files])


def reconstruct_job(plan_file: str) -> dg.JobDefinition:
    """A plan's job, for a process that runs one of its steps."""
    definitions = plan_definitions(Path(plan_file))
    return definitions.resolve_job_def(job_name(load_plan(Path(plan_file))))
