"""`logratio audit`: two models that are there already, from a file to a report, without a plan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scoring.oracle import Oracle, build_adapter
from support import PROJECT, build_tiny_model, prepared

from assets.cli import main
from assets.definitions import plan_definitions
from pipeline.errors import PlanError, SourceError
from pipeline.models import Checkpoint
from pipeline.plan import Plan, load_plan, write_audit_plan
from pipeline.sources import shape_of
from pipeline.stages import compute_rewards, score, train, write_report
from pipeline.store import Store, read


def audited(path: Path, *overrides: str) -> tuple[Plan, Store]:
    """An audit's plan run through its stages."""
    plan, store = prepared(path, "scoring.null_test_rows=2", *overrides)
    (name,) = plan.policies
    score(plan, store, name)
    compute_rewards(plan, store, name)
    return plan, store


@pytest.mark.parametrize("adapted", [False, True])
def test_an_audit_is_the_difference_of_two_float64_models(
    tmp_path: Path, tiny_model: Path, write_pairs: Any, adapted: bool
) -> None:
    if adapted:
        policy = build_adapter(tiny_model, tmp_path / "Their Adapter")
        judged = Oracle(Checkpoint(tiny_model, policy))
    else:
        policy = build_tiny_model(tmp_path / "Their Model", seed=4)
        judged = Oracle(Checkpoint(policy))
    path = write_audit_plan(write_pairs(16), str(tiny_model), str(policy), store=tmp_path / "store")
    assert path == tmp_path / "store" / "audit_p" / "plan.yaml"
    plan, store = audited(path)
    name = "their_adapter" if adapted else "their_model"
    rewards = read(store, f"rewards/{name}").sort("pair_id")
    assert rewards.height == 16
    assert set(rewards["split"]) == {"evaluation"}
    sequences = {row["sequence_id"]: row for row in read(store, "sequences").to_dicts()}
    reference = Oracle(Checkpoint(tiny_model))
    ways = read(store, "pair_sequences").sort("pair_id")
    control = 0.0
    for row, way in zip(rewards.to_dicts(), ways.to_dicts(), strict=True):
        for side in ("chosen", "rejected"):
            sequence = sequences[way[f"{side}_id"]]
            ids = [np.array(sequence[f"{part}_ids"]) for part in ("prompt", "completion")]
            expected = judged.logprobs(*ids).sum() - reference.logprobs(*ids).sum()
            assert row[f"logratio_{side}"] == pytest.approx(expected, abs=1e-4)
            # The control: the two models swapped.
            control = max(control, abs(row[f"logratio_{side}"] + expected))
        assert row["reward_chosen"] == pytest.approx(0.1 * row["logratio_chosen"])
    assert control > 1.0
    report = json.loads(write_report(plan, store, name).json.read_text())
    assert report["training"] is None
    assert report["held_out_split"] == "evaluation"
    assert report["baselines"]["cross_validated"]
    assert report["pairs"]["n_unaccounted"] == 0


def test_a_model_against_itself_is_all_ties_in_any_beta(
    tmp_path: Path, tiny_model: Path, write_pairs: Any
) -> None:
    path = write_audit_plan(
        write_pairs(12), str(tiny_model), str(tiny_model), store=tmp_path / "store"
    )
    plan, store = audited(path, "report.beta=0.3")
    (name,) = plan.policies
    rewards = read(store, f"rewards/{name}")
    assert rewards["margin"].to_list() == [0.0] * 12
    assert rewards["correct"].to_list() == [0.5] * 12
    assert rewards["beta"].unique().to_list() == [0.3]
    assert read(store, "scorers").height == 1, "one model, scored once"


@pytest.mark.slow
def test_the_command_line_goes_from_a_file_to_a_report(
    tmp_path: Path, tiny_model: Path, write_pairs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = build_tiny_model(tmp_path / "theirs", seed=4)
    command = [
        *("audit", str(write_pairs(12)), "--reference", str(tiny_model), "--policy", str(policy)),
        *("--store", str(tmp_path / "store"), "--name", "mine"),
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    plan_file = tmp_path / "store" / "mine" / "plan.yaml"
    assert f"plan       {plan_file}" in said
    assert "audit      theirs: policy against reference" in said
    assert said.count("24 rows scored, 0 reused, model loaded") == 2
    assert "on 12 evaluation pairs, 95 % interval" in said
    (page,) = (plan_file.parent / "reports" / "theirs").glob("current.html")
    assert f"report     {page}" in said
    assert main([*command, "--set", "report.beta=0.3"]) == 0
    assert capsys.readouterr().out.count("0 rows scored, 24 reused, no model loaded") == 2


def test_the_command_line_writes_the_plan_it_runs(
    tmp_path: Path, tiny_model: Path, write_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Path, list[str]]] = []

    def record(path: Path, overrides: list[str]) -> int:
        ran.append((path, overrides))
        return 0

    monkeypatch.setattr("assets.cli.run_plan", record)
    command = ["audit", str(write_pairs()), "--reference", str(tiny_model), "--policy", "org/b"]
    options = ["--store", str(tmp_path / "s"), "--dtype", "bfloat16", "--engine", "vllm"]
    assert main([*command, *options, "--set", "report.beta=0.2"]) == 0
    ((path, overrides),) = ran
    plan = load_plan(path, overrides)
    assert plan.report.beta == 0.2
    assert {(m.dtype, m.engine) for m in plan.models.values()} == {("bfloat16", "vllm")}
    assert plan.audits["org_b"].policy == "policy"
    assert plan.store == tmp_path / "s"


def test_the_graph_of_an_audit_trains_nothing_and_scores_each_model_once(
    tmp_path: Path, tiny_model: Path, write_pairs: Any
) -> None:
    path = write_audit_plan(
        write_pairs(), str(tiny_model), str(tiny_model), store=tmp_path / "s", name="a"
    )
    graph = plan_definitions(path).resolve_asset_graph()
    (name,) = load_plan(path).audits
    keys = {key.path[-1] for key in graph.get_all_asset_keys()}
    assert {key for key in keys if "_" + name in key or "logprobs" in key} == {
        "logprobs_reference",
        f"logprobs_{name}",
        f"implicit_rewards_{name}",
        f"reward_report_{name}",
    }
    assert not any(key.startswith("policy") for key in keys)


def test_a_policy_a_plan_has_trained_is_found_by_its_pointer(
    write_plan: Any, write_pairs: Any, tiny_model: Path, tmp_path: Path
) -> None:
    trained, store = prepared(write_plan())
    train(trained, store, "dpo")
    score(trained, store, "dpo")
    compute_rewards(trained, store, "dpo")
    pointer = store.current("policies/dpo", ".json")
    path = write_audit_plan(write_pairs(), str(tiny_model), str(pointer), store=store.root)
    _, audit = audited(path)
    theirs, ours = (
        read(s, "rewards/dpo").sort("pair_id")["logratio_chosen"] for s in (audit, store)
    )
    assert theirs.equals(ours)
    assert ours.abs().max() > 0  # type: ignore[operator]
    pointer.write_text("{}")
    with pytest.raises(PlanError, match="does not name a policy"):
        write_audit_plan(write_pairs(), "a", str(pointer), store=tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.jsonl: no such file"):
        write_audit_plan(tmp_path / "nowhere.jsonl", "a", "b", store=tmp_path)
    assert main(["audit", str(tmp_path / "x"), "--reference", "a", "--policy", "b"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_the_shape_is_found_out(tmp_path: Path) -> None:
    assert shape_of(PROJECT / "sample" / "preferences.jsonl") == "conversational"
    assert shape_of(PROJECT / "sample" / "bad_rows.jsonl") == "conversational"
    assert shape_of(PROJECT / "sample" / "bad_rows_hh.jsonl") == "hh"
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(SourceError, match="as hh: missing_field"):
        shape_of(strange)
    strange.write_text("")
    with pytest.raises(SourceError, match="it is empty"):
        shape_of(strange)


def test_a_folder_and_hub_ids_are_named_as_they_are(tmp_path: Path, write_pairs: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text("about these pairs")
    with pytest.raises(SourceError, match=r"no file ends in \.jsonl"):
        write_audit_plan(folder, "a", "b", store=tmp_path / "s")
    write_pairs().rename(folder / "p.jsonl")
    path = write_audit_plan(folder, "org/Base-7B", "org/Policy-7B", store=tmp_path / "s")
    plan = yaml.safe_load(path.read_text())
    assert plan["name"] == "audit_data"
    assert plan["evaluation"]["pairs"] == {"path": str(folder), "shape": "conversational"}
    assert plan["models"]["policy"] == {"checkpoint": "org/Policy-7B"}
    assert list(plan["audits"]) == ["org_policy_7b"]
