"""A whole plan with vLLM forced, and the check that compares two engines; the real CPU engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from support import build_tiny_model

from assets.definitions import plan_definitions
from pipeline.errors import ScoringError
from pipeline.names import store_of
from pipeline.parity import engine_parity
from pipeline.plan import load_plan
from pipeline.scoring.engines.vllm_engine import VllmEngine
from pipeline.scoring.ledger import scorers
from pipeline.stages import score
from pipeline.store import read

WritePlan = Any
OBJECTIVES = {name: {"loss": name, "reference": "base", "start": "base"} for name in ("dpo", "kto")}
TRAINING = {"epochs": 8, "batch_pairs": 4, "learning_rate": 1e-2}


@pytest.fixture
def model(tmp_path: Path) -> dict[str, str]:
    """vLLM's CPU kernels know heads from 32 dimensions on."""
    return {"checkpoint": str(build_tiny_model(tmp_path / "model", head_dim=32))}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


def run(path: Path, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = plan_definitions(path).resolve_job_def("tiny_job")
    resource = {"tiny_plan": {"config": {"path": str(path)}}}
    return job.execute_in_process(
        instance=instance, run_config={"resources": resource}, raise_on_error=False
    )


def metadata(result: dg.ExecuteInProcessResult, key: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(f"tiny__{key}")
    return {name: value.value for name, value in event.metadata.items()}


def agreements(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    return {
        check.asset_key.path[-1]: {
            "passed": check.passed,
            **{key: value.value for key, value in check.metadata.items()},
        }
        for check in result.get_asset_check_evaluations()
        if check.check_name == "engines_agree"
    }


def test_a_plan_with_vllm_forced_runs_from_end_to_end(
    write_plan: WritePlan, model: dict[str, str], instance: dg.DagsterInstance
) -> None:
    path = write_plan(
        models={"base": {**model, "engine": "vllm"}},
        objectives=OBJECTIVES,
        training=TRAINING,
        scoring={"null_test_rows": 4, "parity": {"engine": "torch", "split": "test"}},
    )
    result = run(path, instance)
    assert result.success
    assert all(check.passed for check in result.get_asset_check_evaluations())
    store = store_of(load_plan(path))
    for name in OBJECTIVES:
        policy = metadata(result, f"policy_{name}")
        # vLLM's reference, torch's trainer: corrected, and so exactly 0 at the start.
        assert policy["first_accuracy"] == 0.5
        assert 0 < policy["reference_correction_max_nats"] < 5e-3
        steps = read(store, f"training_steps/{name}")
        assert steps["rewards/margins"][0] == 0.0
        assert metadata(result, f"logprobs_{name}")["engine"].startswith("vllm 0.")
        assert read(store, f"rewards/{name}").height == 12
    table = scorers(store.ledger)
    assert set(table.filter(table["adapter"] != "")["engine"]) == {"vllm", "torch"}
    for shown in agreements(result).values():
        assert (shown["engine"], shown["other"]) == ("vllm", "torch")
        assert shown["logratio_mean"] <= shown["logratio_max"] <= 5e-3 < shown["control"]
    again = run(path, instance)
    assert again.success
    assert metadata(again, "logprobs_dpo")["model_loaded"] is False
    assert agreements(again) == agreements(result)


def test_engines_agree_fails_when_the_second_engine_forgets_the_adapter(
    write_plan: WritePlan,
    model: dict[str, str],
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_plan(
        models={"base": model},
        objectives={"dpo": OBJECTIVES["dpo"]},
        training=TRAINING,
        scoring={"null_test_rows": 2, "parity": {"engine": "vllm", "split": "test"}},
    )
    ask = VllmEngine._ask

    def forgetful(self: VllmEngine, *arguments: Any) -> Any:
        self._request = None
        return ask(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "_ask", forgetful)
        lied = run(path, instance)
    (shown,) = agreements(lied).values()
    assert not shown["passed"]
    assert shown["logratio_max"] == pytest.approx(shown["control"], abs=5e-3)
    assert shown["reference_max"] <= 5e-3, "the reference has no adapter to forget"
    assert lied.success, "the check does not take the report away"


def test_a_second_engine_that_is_the_first_is_refused(write_plan: WritePlan) -> None:
    from pipeline.intake import run_intake
    from pipeline.stages import compute_rewards, tokenize, train

    path = write_plan(scoring={"parity": {"engine": "torch"}})
    plan = load_plan(path)
    store = store_of(plan)
    run_intake(plan, store)
    tokenize(plan, store)
    score(plan, store, "base")
    train(plan, store, "dpo")
    score(plan, store, "dpo")
    compute_rewards(plan, store, "dpo")
    with pytest.raises(ScoringError, match="is scored with torch"):
        engine_parity(plan, store, "dpo")
    with pytest.raises(ScoringError, match="no pair of the split 'evaluation'"):
        engine_parity(load_plan(path, ["scoring.parity.split=evaluation"]), store, "dpo")
    with pytest.raises(ScoringError, match="is not set"):
        engine_parity(load_plan(path, ["scoring.parity=null"]), store, "dpo")
