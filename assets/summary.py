"""What a run did, in a few lines for a terminal."""

from typing import Any

import dagster as dg

from pipeline.estimate import estimate
from pipeline.plan import Plan


def beginning(plan: Plan) -> str:
    """What a run is about to do, and what that costs.

    Raises:
        pipeline.errors.SourceError: a source cannot be read.
    """
    lines = [f"plan '{plan.name}': {estimate(plan)}"]
    lines += [
        f"  objective  {name}: {plan.objectives[name]}{_round(plan, name)}"
        for name in plan.policies
        if name in plan.objectives
    ]
    lines += [
        f"  audit      {name}: {audit.policy} against {audit.reference}"
        for name, audit in plan.audits.items()
    ]
    return "\n".join(lines)


def _round(plan: Plan, name: str) -> str:
    """What of other objectives' policies an objective takes."""
    objective = plan.objectives[name]
    said = [("from", objective.start), ("against", objective.reference)]
    return "".join(f", {how} {base}'s policy" for how, base in said if base in plan.objectives)


def summary(plan: Plan, result: dg.JobExecutionResult, seconds: float) -> str:
    """Rows, scoring, training, accuracy, and where tables and reports are."""
    found = _metadata(result)
    lines = [f"plan '{plan.name}': {'done' if result.success else 'FAILED'} in {seconds:.0f} s"]
    if pairs := found.get((plan.name, "preference_pairs")):
        rows = found.get((plan.name, "quarantined_rows"), {}).get("dagster/row_count", 0)
        labels = found.get((plan.name, "preference_labels"), {}).get("dagster/row_count", 0)
        beside = f" and {labels} labels" if labels else ""
        lines.append(
            f"  pairs      {pairs['dagster/row_count']}{beside} valid, {rows} rows quarantined"
        )
    for name in (*plan.scored_models, *plan.policies):
        if data := found.get((plan.name, f"logprobs_{name}")):
            loaded = "model loaded" if data["model_loaded"] else "no model loaded"
            lines.append(
                f"  scoring    {name}: {data['rows_scored']} rows scored, "
                f"{data['rows_reused']} reused, {loaded}"
            )
    for name in plan.policies:
        if data := found.get((plan.name, f"policy_{name}")):
            lines.append(f"  training   {name}: {_training(data)}")
    for check in result.get_asset_check_evaluations():
        if check.check_name == "engines_agree":
            lines.append(_agreement(check))
        if not check.passed:
            lines.append(f"  CHECK FAILED  {check.asset_key.to_user_string()}: {check.check_name}")
    for event in result.all_events:
        if event.is_step_failure and event.step_failure_data.error:
            lines.append(f"  STEP FAILED   {event.step_key}: {_cause(event.step_failure_data)}")
    for name in plan.policies:
        if data := found.get((plan.name, f"reward_report_{name}")):
            lines += _accuracy(name, data)
            lines += [f"  report     {data['report']}", f"  numbers    {data['json']}"]
    lines.append(f"  tables     {plan.store / plan.name}")
    return "\n".join(lines)


def _training(policy: dict[str, Any]) -> str:
    """What became of a policy, by its asset's metadata."""
    if policy["kept"]:
        return f"nothing trained, the policy is kept: {policy['kept_because']}"
    if not policy["trained"]:
        return "nothing trained, the policy was there already"
    said = f"{policy['steps']} steps, loss {policy['first_loss']:.4f} -> {policy['last_loss']:.4f}"
    first = policy["first_accuracy"]  # of pairs; None where step 1 had labels only
    return said if first is None else f"{said}, accuracy at step 1 {first:g}"


def _metadata(result: dg.JobExecutionResult) -> dict[tuple[str, ...], dict[str, Any]]:
    """Metadata of every asset the run materialised, by key."""
    found = {}
    for event in result.all_events:
        if event.is_step_materialization:
            entry = event.step_materialization_data.materialization
            values = {key: value.value for key, value in entry.metadata.items()}
            found[tuple(entry.asset_key.path)] = values
    return found


def _agreement(check: dg.AssetCheckEvaluation) -> str:
    """How far two engines' log-ratios are apart, and what a lost adapter would have shown."""
    said = {key: value.value for key, value in check.metadata.items()}
    name = check.asset_key.path[-1].removeprefix("implicit_rewards_")
    return (
        f"  engines    {name}: {said['other']} against {said['engine']} on {said['n']} sequences: "
        f"at most {said['logratio_max']:.2g} nats apart, mean {said['logratio_mean']:.2g} "
        f"(allowed {said['tolerance']:g}; without the adapter {said['control']:.2g})"
    )


def _accuracy(name: str, report: dict[str, Any]) -> list[str]:
    """The accuracy on held-out or else on evaluation pairs, with its interval; or nothing."""
    for split, what in (("test", "held-out"), ("evaluation", "evaluation")):
        if n := report.get(f"splits/{split}/n"):
            mean, low, high = (
                report[f"splits/{split}/accuracy{part}"] for part in ("", "_low", "_high")
            )
            return [
                f"  accuracy   {name}: {mean:.3f} on {n} {what} pairs, "
                f"95 % interval {low:.3f} to {high:.3f}"
            ]
    return []


def _cause(failure: Any) -> str:  # dagster's own type is not public
    error = failure.error
    while error.cause is not None:
        error = error.cause
    return str(error.message).strip()
