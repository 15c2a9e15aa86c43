"""The estimate before a run: it counts what the run will do, and its minutes grow with it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import prepared

from pipeline import estimate as module
from pipeline.estimate import Estimate, estimate
from pipeline.intake import run_intake
from pipeline.models import model_size
from pipeline.names import store_of, wanted_sequences
from pipeline.plan import load_plan
from pipeline.stages import tokenize
from pipeline.store import read

WritePlan = Any


@pytest.fixture(autouse=True)
def a_machine_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_multiply_adds_per_second", lambda n_threads: n_threads * 1e6)


def seconds(path: Path, *overrides: str) -> float:
    found = estimate(load_plan(path, overrides)).seconds
    assert found is not None
    return found


def test_it_counts_the_plans_pairs_and_about_its_tokens(write_plan: WritePlan) -> None:
    plan = load_plan(write_plan())
    found = estimate(plan)
    store = store_of(plan)
    run_intake(plan, store)
    tokenize(plan, store)
    assert found.n_pairs == read(store, "pairs").height == 12
    rows = wanted_sequences(plan, store, "base")
    tokens = rows.select((rows["n_prompt"] + rows["completion_ids"].list.len()).sum()).item()
    # The reference and one policy; "about" is a factor of two, since text is not tokenised.
    assert 0.5 < found.n_tokens_scored / (2 * tokens) < 2


def test_what_the_ledger_holds_is_taken_off(
    write_plan: WritePlan, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = {"objectives": {}, "audits": {"a": {"reference": "base", "policy": "base"}}}
    path = write_plan(**audit)
    before = estimate(load_plan(path))
    assert before.n_known == 0
    plan, _ = prepared(path)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.scoring.run.open_engine", None)  # nothing is loaded
        after = estimate(plan)
    # The model's sequences are known, and so are the audit's, whose policy is the same model.
    assert after.n_known == 2 * 24
    assert (after.n_tokens_scored, after.seconds) == (0, 0)
    assert "48 log-probs are in the ledger; no model will be loaded" in str(after)
    # Half of the data is new: about half is to be scored.
    rows = [json.loads(line) for line in (path.parent / "p.jsonl").read_text().splitlines()]
    more = [
        {**row, "prompt": [{"role": "user", "content": f"new {i}"}]} for i, row in enumerate(rows)
    ]
    with (path.parent / "p.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    grown = estimate(plan)
    assert grown.n_pairs == 24
    assert grown.n_tokens_scored == pytest.approx(before.n_tokens_scored, rel=0.2)
    # Another dtype is another scorer, and a policy that is trained here may be another one.
    assert estimate(load_plan(path, ["models.base.dtype=bfloat16"])).n_known == 0
    trained = estimate(load_plan(write_plan()))
    assert trained.n_known == 24
    assert 0 < trained.n_tokens_scored <= before.n_tokens_scored


def test_minutes_grow_with_what_is_asked_for(write_plan: WritePlan) -> None:
    one = write_plan()
    base = seconds(one)
    assert seconds(one, "training.epochs=5") > base
    assert seconds(one, "training.epochs=5", "training.max_steps=1") < base
    assert seconds(one, "limit_pairs=6") < base
    assert seconds(one, "scoring.parity={engine: vllm}") > base + 2 * 30
    assert seconds(one, "training.lora.last_layers=1") < base
    assert seconds(one, "scoring.train_pairs=0") < base
    assert seconds(one, "model_steps=2") == base, "one objective has nothing beside it"
    two = {n: {"loss": n, "reference": "base", "start": "base"} for n in ("dpo", "ipo")}
    with_ipo = seconds(write_plan(objectives=two))
    two["ipo"]["loss"] = "kto"
    with_kto = seconds(write_plan(objectives=two))
    assert base < with_ipo < with_kto, "mismatched replies cost"


def test_what_cannot_be_told_is_not_told(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(write_plan())
    found = estimate(plan)
    assert found.seconds is not None
    assert f"some {round(found.seconds / 60)} min" in str(found)
    monkeypatch.setattr(module, "found_device_class", lambda: "cuda-sm90")
    assert estimate(plan).seconds is None
    assert "cannot be estimated" in str(Estimate(1, 2, 3, None))
    monkeypatch.undo()
    nowhere = load_plan(write_plan(models={"base": {"checkpoint": "someone/elsewhere"}}))
    assert estimate(nowhere).seconds is None


def test_parameters_are_counted_from_headers(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tiny = model_size(str(tiny_model))
    assert tiny is not None
    assert tiny.parameters == sum(p.numel() for p in model.parameters())
    assert tiny.layers == 2
    packaged = model_size("packaged:smollm2-135m-instruct")
    assert packaged is not None
    assert packaged.parameters == pytest.approx(134.5e6, rel=0.01), "SmolLM2-135M, its head tied"
    assert packaged.layers == 30
    assert model_size("someone/elsewhere") is None
