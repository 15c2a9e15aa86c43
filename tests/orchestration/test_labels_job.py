"""A plan of labels alone, from its source to its reports, as Dagster runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.definitions import plan_definitions
from assets.summary import summary
from pipeline.plan import load_plan

WritePlan = Any
OF = {"reference": "base", "start": "base"}


def test_a_plan_of_labels_alone_runs_to_its_reports(
    write_plan: WritePlan, write_labels: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    path = write_plan(
        sources={"labels": write_labels(20)},
        objectives={"kto": {"loss": "kto", **OF}, "bco": {"loss": "bco_unpaired", **OF}},
    )
    job = plan_definitions(path).resolve_job_def("tiny_job")
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        result = job.execute_in_process(
            instance=instance,
            run_config={"resources": {"tiny_plan": {"config": {"path": str(path)}}}},
            raise_on_error=False,
        )
        assert result.success
        failed = [c.check_name for c in result.get_asset_check_evaluations() if not c.passed]
        assert failed == []
        (event,) = result.asset_materializations_for_node("tiny__policy_kto")
    found: dict[str, Any] = {name: value.value for name, value in event.metadata.items()}
    assert found["rows_desirable"] + found["rows_undesirable"] == 20 - _held_out(path)
    assert found["class_ratio"] == found["rows_desirable"] / found["rows_undesirable"]
    assert "KTO's paper asks for" in found["class_advice"]
    assert found["first_accuracy"] is None
    anything: Any = result  # it has what a job's result has
    said = summary(load_plan(path), anything, 1.0)
    assert "0 and 20 labels valid" in said
    assert "accuracy at step 1" not in said


def _held_out(path: Path) -> int:
    plan = load_plan(path)
    labels = pl.read_parquet(plan.store / plan.name / "labels" / "current.parquet")
    return labels.filter(pl.col("split") != "train").height
