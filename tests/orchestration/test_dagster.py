"""The graph, the job, the checks; over the tiny model, in Dagster itself."""

import html
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from forks import serve
from support import PROJECT, build_tiny_model

from assets.cli import main
from assets.definitions import defs, plan_definitions, plan_files
from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.rules import INTAKE, RULES
from pipeline.scoring.engines.base import Group
from pipeline.scoring.engines.torch_engine import TorchEngine
from pipeline.store import current_snapshot, read

WritePlan = Any


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


def run(path: Path, instance: dg.DagsterInstance, **config: Any) -> dg.ExecuteInProcessResult:
    job = plan_definitions(path).resolve_job_def("tiny_job")
    resource = {"tiny_plan": {"config": {"path": str(path), **config}}}
    return job.execute_in_process(
        instance=instance, run_config={"resources": resource}, raise_on_error=False
    )


def metadata(result: dg.ExecuteInProcessResult, key: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(f"tiny__{key}")
    return {name: value.value for name, value in event.metadata.items()}


def test_the_demo_graph() -> None:
    graph = plan_definitions(PROJECT / "plans" / "demo.yaml").resolve_asset_graph()
    edges = {
        "/".join(key.path[1:]): sorted("/".join(p.path[1:]) for p in graph.get(key).parent_keys)
        for key in graph.get_all_asset_keys()
    }
    expected = {
        "raw_preferences": [],
        "preference_pairs": ["raw_preferences"],
        "preference_labels": ["raw_preferences"],
        "quarantined_rows": ["raw_preferences"],
        "sequences": ["preference_labels", "preference_pairs"],
        "logprobs_smollm2": ["sequences"],
    }
    for name in ("dpo", "ipo", "simpo", "kto"):
        rewards = f"implicit_rewards_{name}"
        expected |= {
            f"policy_{name}": [
                "logprobs_smollm2",
                *(["preference_labels"] if name == "kto" else []),  # the others are of pairs
                *("preference_pairs", "sequences"),
            ],
            f"logprobs_{name}": [f"policy_{name}", "sequences"],
            rewards: sorted(
                [
                    *(f"logprobs_{name}", "logprobs_smollm2", f"policy_{name}"),
                    *("preference_pairs", "sequences"),
                ]
            ),
            f"reward_report_{name}": sorted(
                [rewards, f"policy_{name}", "preference_pairs", "quarantined_rows"]
            ),
        }
    expected["loss_landscape"] = sorted(
        ["preference_pairs", *(key for key in expected if "implicit_rewards" in key)]
    )
    assert edges == expected
    checks = {key.name for key in graph.asset_check_keys if "implicit" in str(key.asset_key)}
    assert checks == {"every_reported_pair_has_a_reward", "engines_agree"}


def test_the_workspace_loads_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dagster", "definitions", "validate"),
            *("-w", str(PROJECT / "workspace.yaml")),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_every_plan_in_the_folder_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGRATIO_PLANS", raising=False)
    assert PROJECT / "plans" / "demo.yaml" in plan_files()
    dg.Definitions.validate_loadable(defs())


def test_two_plans_side_by_side(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [write_plan(), PROJECT / "plans" / "demo.yaml"]
    monkeypatch.setenv("LOGRATIO_PLANS", os.pathsep.join(map(str, plans)))
    keys = {key.path[0] for key in defs().resolve_asset_graph().get_all_asset_keys()}
    assert keys == {"tiny", "demo"}


def test_a_sequence_that_cannot_be_scored_is_named_by_the_check(
    write_plan: WritePlan, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TorchEngine.score
    victims: list[str] = []

    def short_of_memory(
        engine: TorchEngine, groups: Sequence[Group], batch_tokens: int
    ) -> list[list[np.ndarray]]:
        ids = [c.sequence_id for group in groups for c in group.completions]
        victims[:] = victims or ids[:1]
        if victims[0] in ids:
            raise MemoryError("no room")
        return real(engine, groups, batch_tokens)

    monkeypatch.setattr(TorchEngine, "score", short_of_memory)
    path = write_plan()
    result = run(path, instance)
    assert not result.success
    (check,) = (
        c
        for c in result.get_asset_check_evaluations()
        if c.check_name == "every_sequence_is_scored"
    )
    assert not check.passed
    said = {name: value.value for name, value in check.metadata.items()}
    assert (said["wanted"], said["held"]) == (24, 23)
    assert said["unscored"] == {victims[0]: "out_of_memory: MemoryError: no room"}
    monkeypatch.undo()
    again = run(path, instance)
    assert again.success
    assert metadata(again, "logprobs_base")["rows_scored"] == 1


def test_one_job_from_pairs_to_report(write_plan: WritePlan, instance: dg.DagsterInstance) -> None:
    path = write_plan()
    result = run(path, instance)
    assert result.success
    checks = {c.check_name: c.passed for c in result.get_asset_check_evaluations()}
    assert checks == {
        "every_row_is_accounted_for": True,
        "no_prompt_is_in_two_splits": True,
        "no_training_prompt_is_near_an_evaluated_one": True,
        "rules_stay_within_their_limits": True,
        "every_pair_is_tokenised_or_listed": True,
        "every_sequence_is_scored": True,
        "logprobs_are_finite": True,
        "scoring_is_repeatable": True,
        "training_starts_where_the_tables_say": True,
        "every_reported_pair_has_a_reward": True,
    }
    assert metadata(result, "policy_dpo")["first_accuracy"] == 0.5
    assert metadata(result, "logprobs_base")["rows_scored"] == 24
    store = store_of(load_plan(path))
    rewards = read(store, "rewards/dpo")
    assert rewards.height == 12
    # Every margin has what it may be off by beside it.
    floors = metadata(result, "logprobs_base"), metadata(result, "logprobs_dpo")
    floor = max(found["noise_floor_nats"] for found in floors)
    assert rewards["noise_floor"].to_list() == [0.1 * 4 * floor] * 12
    # The same numbers in the page's JSON, in Dagster, and in the table.
    report = metadata(result, "reward_report_dpo")
    held_out = rewards.filter(pl.col("split") == "test")
    numbers = json.loads(Path(report["json"]).read_text())["splits"]["test"]
    assert report["splits/test/n"] == numbers["n"] == held_out.height > 0
    assert report["splits/test/accuracy"] == numbers["accuracy"]
    assert numbers["accuracy"] == pytest.approx(held_out["correct"].mean())
    assert report["splits/test/margin_mean"] == pytest.approx(held_out["margin"].mean())
    assert "<html" in Path(report["report"]).read_text()
    # The landscape asks the same rows: DPO's own weight at the objective's beta is in both.
    landscape = read(store, "loss_landscape")
    assert metadata(result, "loss_landscape")["dagster/row_count"] == landscape.height
    as_trained = landscape.filter(loss="dpo", beta=0.1)
    assert as_trained["weight_mean"].item() == pytest.approx(rewards["gradient_weight"].mean())
    assert "data:image/png;base64" in metadata(result, "loss_landscape")["figure"]


def test_rules_are_counted_over_time_and_shown_by_escaped_examples(
    write_plan: WritePlan, write_pairs: Any, instance: dg.DagsterInstance
) -> None:
    """Two runs over a source that grows worse; the second is past a limit and stops."""
    path = write_plan(rules={"invalid_json": {"at_most": 0.4}})
    assert run(path, instance).success
    source = Path(load_plan(path).sources["pairs"].path)
    good = source.read_bytes()
    nasty = b'{"<script>|`[x](javascript:1)\xe2\x80\xae" ' + b"x" * 300
    source.write_bytes(good + b"\n".join([nasty] * 7))
    assert run(path, instance).success
    source.write_bytes(good + b"\n".join([nasty] * 12))
    assert not run(path, instance).success

    key = dg.AssetKey(["tiny", "quarantined_rows"])
    found = instance.fetch_materializations(key, limit=9, ascending=True).records
    seen = [record.asset_materialization for record in found]
    counts = [event.metadata["rule/invalid_json"].value for event in seen if event is not None]
    assert counts == [0, 7, 12]
    names = {name for event in seen if event for name in event.metadata if name.startswith("rule/")}
    assert names == {f"rule/{rule.name}" for rule in RULES.values() if rule.stage in INTAKE}
    assert seen[1] is not None
    examples = str(seen[1].metadata["examples"].value).splitlines()
    assert len(examples) == 2 + 5
    for line in examples[2:]:
        assert line.count("|") == 5
        assert "<" not in line
        assert "`" not in line
        assert "\u202e" not in line
        assert "javascript:" not in line
        assert html.unescape(line.split("|")[4]).strip().startswith('{"<script>|`[x](javascript:1)')
        assert len(line) < 1200
    (check,) = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(key, "rules_stay_within_their_limits"), limit=1
    )
    assert str(check.status).endswith("FAILED")


def test_a_second_run_computes_nothing(
    write_plan: WritePlan, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_plan()
    assert run(path, instance).success
    store = store_of(load_plan(path))
    tables = ("pairs", "rows", "quarantine", "sequences", "pair_sequences", "rewards/dpo")
    before = [current_snapshot(store, name).digest for name in tables]
    page = current_snapshot(store, "reports/dpo", ".html").digest

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pipeline.scoring.engines.torch_engine.load_model", fail)
    monkeypatch.setattr("pipeline.training.run.model.load_model", fail)
    again = run(path, instance)
    assert again.success
    for name in ("base", "dpo"):
        scored = metadata(again, f"logprobs_{name}")
        assert (scored["rows_scored"], scored["rows_reused"]) == (0, 24)
        assert scored["model_loaded"] is False
    assert metadata(again, "policy_dpo")["trained"] is False
    assert [current_snapshot(store, name).digest for name in tables] == before
    assert current_snapshot(store, "reports/dpo", ".html").digest == page


def test_one_changed_row_scores_only_its_own_sequences(
    write_plan: WritePlan, write_pairs: Any, instance: dg.DagsterInstance
) -> None:
    path = write_plan()
    assert run(path, instance).success
    pairs = write_pairs()  # the plan's own file, written anew
    lines = pairs.read_text().splitlines()
    row = json.loads(lines[3])
    row["chosen"][0]["content"] = "another answer"
    pairs.write_text("\n".join([*lines[:3], json.dumps(row), *lines[4:]]))
    assert metadata(run(path, instance), "logprobs_base")["rows_scored"] == 1


def test_the_launchpad_overrides_any_value(
    write_plan: WritePlan, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_plan()
    monkeypatch.setenv("LOGRATIO__TRAINING__SEED", "3")
    overrides = ["report.beta=0.5", "training.max_steps=1"]
    result = run(path, instance, overrides=overrides)
    assert result.success
    assert metadata(result, "policy_dpo")["steps"] == 1
    rewards = read(store_of(load_plan(path)), "rewards/dpo")
    assert rewards["beta"].unique().to_list() == [0.5]
    done = instance.get_run_by_id(result.run_id)
    assert done is not None
    assert done.tags["logratio/overrides"] == " ".join(["training.seed=3", *overrides])
    assert done.tags["logratio/plan"] == load_plan(path, overrides).digest
    wrong = run(path, instance, overrides=["training.max_step=1"])
    assert not wrong.success


def test_a_lying_ledger_fails_the_check_and_stops_the_run(
    write_plan: WritePlan, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Weights change and the remembered fingerprint is forced to stay."""
    model = build_tiny_model(tmp_path / "model")
    path = write_plan(models={"base": {"checkpoint": str(model)}}, scoring={"null_test": "always"})
    assert run(path, instance).success
    from pipeline import models

    weights = model / "model.safetensors"
    known = models._fingerprint(weights, store_of(load_plan(path)))
    build_tiny_model(model, seed=9)
    with pytest.MonkeyPatch.context() as patch:
        real = models._fingerprint
        patch.setattr(models, "_fingerprint", lambda p, s: known if p == weights else real(p, s))
        lied = run(path, instance)
    assert not lied.success
    failed = {c.check_name for c in lied.get_asset_check_evaluations() if not c.passed}
    assert failed == {"scoring_is_repeatable"}


def test_no_valid_pair_fails_the_run_and_keeps_the_quarantine(
    write_plan: WritePlan, write_pairs: Any, instance: dg.DagsterInstance
) -> None:
    bad = write_pairs(rows=[{"prompt": [], "chosen": "x", "rejected": "y"}], name="bad.jsonl")
    path = write_plan(sources={"bad": {"path": str(bad), "shape": "conversational"}})
    assert not run(path, instance).success
    quarantine = read(store_of(load_plan(path)), "quarantine")
    assert quarantine["rule"].to_list() == ["wrong_type"]


def test_the_command_line_runs_a_plan_in_processes_and_says_what_it_did(
    write_plan: WritePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The real multiprocess executor and a real instance, which then knows the run."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    path = write_plan()
    serve(anew=True)  # steps are forked from it
    assert main(["run", str(path)]) == 0
    first = capfd.readouterr()
    assert first.out.startswith("plan 'tiny': about 12 pairs; ")
    assert "objective  dpo: dpo, beta 0.1" in first.out
    assert "base: 24 rows scored, 0 reused, model loaded" in first.out
    assert "accuracy at step 1 0.5" in first.out
    assert "held-out pairs, 95 % interval" in first.out
    assert "24/24 rows" in first.err
    assert "tokens/s" in first.err
    assert "left" in first.err
    assert main(["run", str(path), "--set", "report.beta=0.3"]) == 0
    second = capfd.readouterr().out
    assert "base: 0 rows scored, 24 reused, no model loaded" in second
    assert "dpo: nothing trained, the policy was there already" in second
    with dg.DagsterInstance.from_config(str(tmp_path / "store" / "dagster")) as home:
        runs = home.get_runs()
        assert [r.status for r in runs] == [dg.DagsterRunStatus.SUCCESS] * 2
        assert runs[0].tags["logratio/overrides"] == "report.beta=0.3"


def test_a_wrong_plan_is_said_plainly(
    write_plan: WritePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(write_plan(training={"epoch": 2}))]) == 2
    said = capsys.readouterr().err
    assert "plan.yaml: training.epoch: unknown key; allowed: method, epochs, max_steps" in said
    assert "Traceback" not in said
