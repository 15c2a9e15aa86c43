"""Audit, filter, retrain as one lineage, in Dagster itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from support import build_tiny_model

from assets.definitions import plan_definitions
from assets.summary import summary
from pipeline.names import policy_id_of, store_of
from pipeline.plan import load_plan
from pipeline.store import read
from pipeline.training.policy import trained_examples

WHERE = "theirs.margin > 0 AND NOT array_contains(flags, 'mojibake')"
DPO = {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "base"}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


@pytest.fixture
def plan_file(write_plan: Any, tiny_model: Path, tmp_path: Path) -> Path:
    """`filtered` is trained on what an audit agrees with, `second` by the rewards of `filtered`."""
    other = build_tiny_model(tmp_path / "other", seed=5)
    path: Path = write_plan(
        models={"base": {"checkpoint": str(tiny_model)}, "other": {"checkpoint": str(other)}},
        audits={"theirs": {"reference": "base", "policy": "other"}},
        # Written in the opposite order to that they can be trained in.
        objectives={
            "second": {**DPO, "weight": "EXP(filtered.margin)"},
            "filtered": {**DPO, "where": WHERE},
            "plain": DPO,
        },
        training={"max_steps": 1, "learning_rate": 1e-3, "retrain": {"min_new_pairs": 15}},
        scoring={"null_test_rows": 2},
    )
    return path


def run(path: Path, instance: dg.DagsterInstance, *overrides: str) -> dg.ExecuteInProcessResult:
    job = plan_definitions(path).resolve_job_def("tiny_job")
    resource = {"tiny_plan": {"config": {"path": str(path), "overrides": list(overrides)}}}
    return job.execute_in_process(
        instance=instance, run_config={"resources": resource}, raise_on_error=False
    )


def metadata(result: dg.ExecuteInProcessResult, key: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(f"tiny__{key}")
    return {name: value.value for name, value in event.metadata.items()}


def test_the_graph_has_the_rewards_before_the_policy(plan_file: Path) -> None:
    graph = plan_definitions(plan_file).resolve_asset_graph()

    def rewards_before(name: str) -> set[str]:
        parents = graph.get(dg.AssetKey(["tiny", f"policy_{name}"])).parent_keys
        return {key.path[-1] for key in parents if "implicit_rewards" in key.path[-1]}

    assert rewards_before("filtered") == {"implicit_rewards_theirs"}
    assert rewards_before("second") == {"implicit_rewards_filtered"}
    assert rewards_before("plain") == set()


def test_audit_filter_retrain(
    plan_file: Path, write_pairs: Any, instance: dg.DagsterInstance
) -> None:
    first = run(plan_file, instance)
    assert first.success
    plan = load_plan(plan_file)
    store = store_of(plan)
    train = read(store, "pairs").filter(split="train")
    audit = read(store, "rewards/theirs").filter(split="train")
    agreed = sorted(audit.filter(pl.col("margin") > 0)["pair_id"])
    assert 0 < len(agreed) < train.height
    for name, expected in (("filtered", agreed), ("plain", sorted(train["pair_id"]))):
        examples = trained_examples(store, policy_id_of(store, name))
        assert examples["example_id"].to_list() == expected
        said = metadata(first, f"policy_{name}")
        assert said["pairs_selected"] == len(expected)
        assert (said["kept"], said["trained"]) == (False, True)
        assert said["pairs_left_out"] + said["pairs_selected"] == train.height
    weighted = trained_examples(store, policy_id_of(store, "second"))
    by_filtered = read(store, "rewards/filtered").select("pair_id", expected=pl.col("margin").exp())
    joined = weighted.join(by_filtered, left_on="example_id", right_on="pair_id")
    assert joined.height == train.height
    assert joined["weight"].to_list() == pytest.approx(joined["expected"].to_list(), rel=1e-14)
    order = [
        event.step_materialization_data.materialization.asset_key.path[-1]
        for event in first.get_asset_materialization_events()
    ]
    steps = ["logprobs_theirs", "implicit_rewards_theirs", "policy_filtered", "logprobs_filtered",
             "implicit_rewards_filtered", "policy_second"]  # fmt: skip
    assert [key for key in order if key in steps] == steps
    # The report's baselines learn from what the policy did.
    assert metadata(first, "reward_report_filtered")["baselines/n_fitted"] == len(agreed)

    write_pairs(20)  # the plan's own file, with eight more
    second = run(plan_file, instance)
    assert second.success
    for name in plan.objectives:
        said = metadata(second, f"policy_{name}")
        assert (said["kept"], said["trained"]) == (True, False)
        assert said["kept_because"].endswith("pairs are new, fewer than 15")
        assert said["policy_id"] == metadata(first, f"policy_{name}")["policy_id"]
    assert "plain: nothing trained, the policy is kept: " in summary(plan, second, 1.0)  # type: ignore[arg-type]
    assert read(store, "rewards/plain").height == 20

    write_pairs(60)
    third = run(plan_file, instance)
    assert third.success
    changed = {
        name: metadata(third, f"policy_{name}")["policy_id"]
        != metadata(first, f"policy_{name}")["policy_id"]
        for name in plan.objectives
    }
    assert changed["plain"]
    assert changed["second"]
    checks = {c.check_name for c in third.get_asset_check_evaluations() if not c.passed}
    assert checks == set()


def test_an_override_that_the_graph_does_not_know_is_refused(
    plan_file: Path, instance: dg.DagsterInstance
) -> None:
    result = run(plan_file, instance, "objectives.plain.where='theirs.margin > 0'")
    assert not result.success
    (failure,) = (
        event
        for event in result.all_events
        if event.is_step_failure and "policy_plain" in str(event.step_key)
    )
    said = str(failure.step_failure_data.error)
    assert "objectives.plain.where: an override names the rewards of theirs" in said
