"""A policy for elsewhere: merged or as an adapter, the same numbers, whole or not there."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import KILLED, begin, ended
from peft import PeftModel
from safetensors.torch import load_file
from scoring.oracle import change_json
from support import build_tiny_model, largest_file, measured, prepared
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from assets.cli import main
from pipeline.errors import ModelError, PlanError, StoreError
from pipeline.export import merged
from pipeline.export.directory import export_policy
from pipeline.export.merged import MERGE_VERSION, merged_policy
from pipeline.names import key_of, policy_of, store_of
from pipeline.plan import load_plan
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import train
from pipeline.store import Store
from pipeline.store import files as store_files
from policies.exports import (
    LEARNS,
    apart,
    chain,
    loaded,
    made_by_hand,
    paths_in,
    ran,
    sequences_in,
    sums,
)

WritePlan = Any


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_merged_policy_is_the_adapter_applied(write_plan: WritePlan, tmp_path: Path) -> None:
    plan, store, trained = ran(write_plan(), *LEARNS)
    base = Path(plan.models["base"].checkpoint)
    target = tmp_path / "out" / "mine"
    done = export_policy(plan, store, "dpo", target)
    assert (done.directory, done.needs_start) == (target, False)
    rows = sequences_in(store)
    applied = sums(loaded(base, trained["dpo"].directory), rows)
    merged = sums(loaded(target), rows)
    differences, control = apart(applied, merged), apart(sums(loaded(base), rows), merged)
    measured(
        f"{rows.height} sequences: merged at most {differences[-1]:.1e} nats from the adapter; "
        f"the base at least {control[0]:.1e}"
    )
    assert differences[-1] <= 1e-4
    assert control[0] > 1e-2, "the control must fail"
    key, _ = key_of(plan, store, "dpo")
    ledger = dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows())
    assert apart(merged, {i: ledger[i] for i in merged})[-1] <= 1e-3


def test_what_a_merged_export_holds(write_plan: WritePlan, tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    generation = {"do_sample": False, "temperature": 0.7, "max_new_tokens": 9}
    (base / "generation_config.json").write_text(json.dumps(generation))
    path = write_plan(models={"base": {"checkpoint": str(base)}})
    plan, store = prepared(path, "training.max_steps=1")
    train(plan, store, "dpo")
    target = tmp_path / "out"
    target.mkdir()  # empty
    done = export_policy(plan, store, "dpo", target)
    assert files(target) == {
        *("config.json", "generation_config.json", "model.safetensors", "policy.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    # transformers would not save such a one; it is the start's own.
    assert json.loads((target / "generation_config.json").read_text()) == generation
    assert GenerationConfig.from_pretrained(target).max_new_tokens == 9
    said = AutoTokenizer.from_pretrained(target)
    one = [{"role": "user", "content": "what is it?"}]
    theirs = AutoTokenizer.from_pretrained(base)
    assert said.apply_chat_template(one) == theirs.apply_chat_template(one)
    assert said.chat_template
    record = json.loads((target / "policy.json").read_text())
    assert record["policy_id"] == done.policy_id
    assert record["start"] == "base: base"
    assert record["objective"]["loss"] == "dpo"
    assert record["merged"]["dtype"] == "float32"
    assert record["merged"]["update_kept"] == pytest.approx(1, abs=1e-3)
    assert record["blake3"].keys() == {"model.safetensors"}
    assert paths_in(target, tmp_path, Path.home()) == []
    assert paths_in(policy_of(plan, store, "dpo")[0], tmp_path), "control: the store's own does"
    weights = load_file(target / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert weights.keys() == load_file(base / "model.safetensors").keys()
    assert not [p for p in weights if "lora" in p]


def test_the_adapter_goes_over_its_start(write_plan: WritePlan, tmp_path: Path) -> None:
    plan, store, trained = ran(write_plan(), *LEARNS)
    base = Path(plan.models["base"].checkpoint)
    target = tmp_path / "adapter"
    done = export_policy(plan, store, "dpo", target, "adapter")
    assert done.needs_start
    assert done.start == f"base: {base.name}"
    assert {"adapter_model.safetensors", "policy.json", "chat_template.jinja"} < files(target)
    assert not [name for name in files(target) if name.endswith(".parquet")]
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert paths_in(target, tmp_path, base) == []
    rows = sequences_in(store)
    over = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), target
    )
    found = sums(over.to(torch.float64).eval(), rows)
    assert apart(found, sums(loaded(base, trained["dpo"].directory), rows))[-1] == 0.0
    assert apart(found, sums(loaded(base), rows))[0] > 1e-2, "control: the base"
    named = tmp_path / "named"
    export_policy(plan, store, "dpo", named, "adapter", base="me/my-sft")
    config = json.loads((named / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/my-sft"
    hub = plan.models["base"].model_copy(update={"checkpoint": "org/model"})
    from pipeline.export.directory import _hub_id

    on_hub = plan.model_copy(update={"models": {"base": hub}})
    assert _hub_id(on_hub, "base") == "org/model"
    packaged = hub.model_copy(update={"checkpoint": "packaged:smollm2-135m-instruct"})
    assert _hub_id(plan.model_copy(update={"models": {"base": packaged}}), "base") is None


def test_a_whole_model_is_its_own_export(write_plan: WritePlan, tmp_path: Path) -> None:
    changes = ["training.method=full", "training.learning_rate=1e-2"]
    plan, store, trained = ran(write_plan(), *changes)
    export_policy(plan, store, "dpo", tmp_path / "out")
    same = (trained["dpo"].directory / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == same
    assert paths_in(tmp_path / "out", tmp_path) == []
    assert not list(store.policies.glob("*merged*"))
    with pytest.raises(PlanError, match="whole model"):
        export_policy(plan, store, "dpo", tmp_path / "adapter", "adapter")


def test_the_dtype_is_the_one_it_was_trained_in_and_what_rounding_takes_is_said(
    store: Store, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of bfloat16's 8 bits is more than a small update: it would be gone, so it is on record.

    The oracle is torch's own rounding of the start's weights plus the update by hand.
    """
    found = {}
    for dtype, std in (("float32", 2e-3), ("bfloat16", 2e-3), ("bfloat16", 0.3)):
        where = Store(store.root / f"{dtype}{std}", "t")
        policy = made_by_hand(where, tiny_model, dtype=dtype, std=std)
        caplog.clear()
        merged = merged_policy(where, policy, tiny_model)
        kept = json.loads((merged / "policy.json").read_text())["merged"]["update_kept"]
        weights = load_file(merged / "model.safetensors")
        start = load_file(tiny_model / "model.safetensors")
        adapter = load_file(policy / "adapter_model.safetensors")
        lora = json.loads((policy / "adapter_config.json").read_text())
        left = whole = 0.0
        for key in adapter:
            if "lora_A" not in key:
                continue
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            low = adapter[key.replace("lora_A", "lora_B")].double()
            update = low @ adapter[key].double() * (lora["lora_alpha"] / lora["r"])
            before = start[name].to(getattr(torch, dtype)).double()
            assert weights[name].dtype == getattr(torch, dtype)
            left += float(((weights[name].double() - before) * update).sum())
            whole += float(update.square().sum())
        assert kept == pytest.approx(left / whole, abs=1e-3)
        found[dtype, std] = kept
        assert ("of the policy's update" in caplog.text) == (kept < 0.9)
    measured(f"share of an update left after merging: {found}")
    assert found["float32", 2e-3] == pytest.approx(1, abs=1e-3)
    assert found["bfloat16", 2e-3] < 0.5, "the control: small beside bfloat16's steps"
    assert found["bfloat16", 0.3] > 0.95


def test_what_cannot_be_merged_is_said(store: Store, tmp_path: Path) -> None:
    tied = build_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    on_head = made_by_hand(store, tied, target_modules=["lm_head"])
    with pytest.raises(ModelError, match=r"lm_head.* share; merged, it would change both"):
        merged_policy(store, on_head, tied)
    elsewhere = Store(tmp_path / "elsewhere", "t")
    inside = made_by_hand(elsewhere, tied)
    kept = merged_policy(elsewhere, inside, tied)
    assert json.loads((kept / "config.json").read_text())["tie_word_embeddings"] is True
    quantised = build_tiny_model(tmp_path / "quantised")
    change_json(quantised / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"is quantised \(gptq\)"):
        merged_policy(store, on_head, quantised)
    change_json(on_head / "adapter_config.json", target_modules=["no_such_module"])
    with pytest.raises(ModelError, match="cannot be merged"):
        merged_policy(store, on_head, tied)
    assert files(store.policies) == {"by_hand"}


def test_a_damaged_policy_is_not_exported(
    store: Store, tiny_model: Path, tmp_path: Path, write_plan: WritePlan
) -> None:
    policy = made_by_hand(store, tiny_model)
    weights = policy / "adapter_model.safetensors"
    good = bytearray(weights.read_bytes())
    good[-1] ^= 1
    weights.write_bytes(good)
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors: damaged"):
        merged_policy(store, policy, tiny_model)
    assert files(store.policies) == {"by_hand"}
    plan, its = prepared(write_plan(), "training.max_steps=1")
    with pytest.raises(StoreError, match="nothing has been published under 'policies/dpo'"):
        export_policy(plan, its, "dpo", tmp_path / "out")
    directory = train(plan, its, "dpo").directory
    change_json(directory / "policy.json", start_model_id="another")
    with pytest.raises(StoreError, match="trained from another 'base' than there is now"):
        export_policy(plan, its, "dpo", tmp_path / "out")
    record = json.loads((directory / "policy.json").read_text())
    del record["start_model_id"]
    (directory / "policy.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="earlier version"):
        export_policy(plan, its, "dpo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def killed_export(path: Path, target: Path, where: str) -> None:
    """Export, and be killed on the way."""

    def saved_and_died(*arguments: Any) -> None:
        save(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    def dies(temporary: Path, final: Path) -> None:
        if where == "publish" or final == target:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(temporary, final)

    save, publish = merged._save, store_files.publish_directory
    if where == "weights":
        merged._save = saved_and_died  # type: ignore[assignment]
    store_files.publish_directory = dies
    plan = load_plan(path)
    export_policy(plan, store_of(plan), "dpo", target)


@pytest.mark.parametrize("where", ["weights", "publish", "copy"])
def test_a_killed_export_leaves_nothing_to_be_seen(
    write_plan: WritePlan, tmp_path: Path, where: str
) -> None:
    path = write_plan()
    plan, store = prepared(path)
    trained = train(plan, store, "dpo")
    target = tmp_path / "exports" / "mine"
    assert ended(begin(killed_export, path, target, where)) == KILLED
    now_merged = f"{trained.policy_id}-merged-{MERGE_VERSION}"
    visible = {path.name for path in store.policies.glob("[!.]*")}
    assert visible == {trained.policy_id} | ({now_merged} if where == "copy" else set())
    assert list(store.policies.glob(".*.tmp")) or where == "copy", "it was on its way"
    assert not target.exists()
    assert not list(target.parent.glob("[!.]*"))
    export_policy(plan, store, "dpo", target)
    assert loaded(target).config.model_type == "llama"


def test_a_full_disk_leaves_nothing(
    write_plan: WritePlan, tiny_model: Path, tmp_path: Path, store: Store
) -> None:
    policy = made_by_hand(store, tiny_model)
    with (
        largest_file(50_000),
        pytest.raises(StoreError, match=r"merged-1: cannot be written.*File"),
    ):
        merged_policy(store, policy, tiny_model)
    assert files(store.policies) == {"by_hand"}
    merged_policy(store, policy, tiny_model)
    plan, its = prepared(write_plan(), "training.max_steps=1")
    train(plan, its, "dpo")
    policy_path, start = policy_of(plan, its, "dpo")
    merged_policy(its, policy_path, start.path)
    with largest_file(50_000), pytest.raises(StoreError, match=r"out: cannot be written: File"):
        export_policy(plan, its, "dpo", tmp_path / "exports" / "out")
    assert files(tmp_path / "exports") == set()


def test_the_command_line(
    write_plan: WritePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(objectives=chain("one", "two"))
    command = ["export", str(path), "two"]
    assert main([*command, str(tmp_path / "early")]) == 2
    assert "nothing has been published under 'policies/two' yet" in capsys.readouterr().err
    ran(path, *LEARNS)
    settings = [argument for change in LEARNS for argument in ("--set", change)]
    assert main([*command, str(tmp_path / "whole"), *settings]) == 0
    assert capsys.readouterr().out == (
        f"policy     two: a model of its own is in {tmp_path / 'whole'}\n"
    )
    assert main([*command, str(tmp_path / "whole"), "--merged"]) == 2
    assert f"{tmp_path / 'whole'}: is there already" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "small"), "--adapter"]) == 0
    assert "two: an adapter over one: the policy " in capsys.readouterr().out
    assert "adapter_config.json" in files(tmp_path / "small")
    assert "adapter_config.json" not in files(tmp_path / "whole")
    assert main(["export", str(path), "three", str(tmp_path / "x")]) == 2
    assert "'three' is not one of the plan's objectives: one, two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "y"), "--merged", "--adapter"])
