"""The plan as a resource, so that the Launchpad can override any of its values."""

from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from pipeline.names import store_of
from pipeline.plan import Plan, environment_overrides, load_plan
from pipeline.processes import share_cores
from pipeline.store import Store


class PlanResource(dg.ConfigurableResource[Any]):
    """A plan file and what a run changes in it."""

    path: str = Field(description="The plan's YAML file.")
    overrides: list[str] = Field(
        default=[],
        description="Values for this run, e.g. training.learning_rate=1e-5, report.beta=0.2. "
        "Models and objectives cannot be added here: they are the graph.",
    )

    def open(self, at_once: int | None = None) -> tuple[Plan, Store]:
        """The plan with its overrides, and its store.

        Args:
            at_once: model steps that may run now, if fewer than the plan allows.

        Raises:
            pipeline.errors.PlanError: the plan or an override is wrong.
        """
        plan = load_plan(Path(self.path), self.overrides)
        share_cores(min(plan.model_steps, at_once or plan.model_steps))
        return plan, store_of(plan)


def opened(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext,
    plan_name: str,
    at_once: int | None = None,
) -> tuple[Plan, Store]:
    """The run's plan and store, from inside an asset; see `PlanResource.open`."""
    resource: PlanResource = getattr(context.resources, resource_key(plan_name))
    return resource.open(at_once)


def tag_run(context: dg.AssetExecutionContext, plan_name: str, plan: Plan) -> None:
    """Record on the run which plan it ran and what was overridden, the Launchpad's included."""
    resource: PlanResource = getattr(context.resources, resource_key(plan_name))
    overrides = " ".join([*environment_overrides(), *resource.overrides])
    tags = {"logratio/plan": plan.digest, "logratio/overrides": overrides}
    context.instance.add_run_tags(context.run.run_id, tags)


def resource_key(plan_name: str) -> str:
    """The resource that holds a plan; several plans live in one code location."""
    return f"{plan_name}_plan"
