"""Rounds in Dagster: lineage shows them, and one job runs them in order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.definitions import plan_definitions
from policies.exports import chain

WritePlan = Any


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


def parents(path: Path) -> dict[str, set[str]]:
    graph = plan_definitions(path).resolve_asset_graph()
    return {
        key.path[-1]: {parent.path[-1] for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }


def test_the_graph_shows_the_rounds(write_plan: WritePlan) -> None:
    objectives = chain("one", "two")
    objectives["against"] = {"loss": "dpo", "start": "base", "reference": "two"}
    edges = parents(write_plan(objectives=objectives))
    common = {"preference_pairs", "sequences"}
    assert edges["policy_one"] == {*common, "logprobs_base"}
    assert edges["policy_two"] == {*common, "logprobs_one", "policy_one"}
    assert edges["policy_against"] == {*common, "logprobs_base", "logprobs_two"}
    assert edges["logprobs_two"] == {"sequences", "policy_two"}
    rewards = {*common, "logprobs_one", "logprobs_two", "policy_two"}
    assert edges["implicit_rewards_two"] == rewards
    alone = parents(write_plan())
    assert alone["policy_dpo"] == {*common, "logprobs_base"}, "the control: no rounds"


def test_one_job_runs_two_rounds(write_plan: WritePlan, instance: dg.DagsterInstance) -> None:
    path = write_plan(objectives=chain("one", "two"))
    job = plan_definitions(path).resolve_job_def("tiny_job")
    resources = {"tiny_plan": {"config": {"path": str(path)}}}

    def run() -> dg.ExecuteInProcessResult:
        return job.execute_in_process(instance=instance, run_config={"resources": resources})

    def metadata(result: dg.ExecuteInProcessResult, key: str) -> dict[str, Any]:
        (event,) = result.asset_materializations_for_node(f"tiny__{key}")
        return {name: value.value for name, value in event.metadata.items()}

    result = run()
    assert result.success
    assert all(check.passed for check in result.get_asset_check_evaluations())
    policies = [metadata(result, f"policy_{name}") for name in ("one", "two")]
    assert policies[0]["policy_id"] != policies[1]["policy_id"]
    assert [policy["first_accuracy"] for policy in policies] == [0.5, 0.5]
    assert (
        metadata(result, "logprobs_one")["model_id"] != metadata(result, "logprobs_two")["model_id"]
    )
    again = run()
    assert again.success
    for name in ("one", "two"):
        assert metadata(again, f"policy_{name}")["trained"] is False
        assert metadata(again, f"logprobs_{name}")["model_loaded"] is False
