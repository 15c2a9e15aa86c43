"""The estimate before a run: it counts what the run will do, and its minutes grow with it."""

from pathlib import Path
from typing import Any

import pytest

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
    assert f"some {round(found.seconds / 60)} min if nothing is there already" in str(found)
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
