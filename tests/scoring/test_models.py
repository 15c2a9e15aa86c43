"""What a model is: its bytes, its config and its adapter; never its path."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support import build_tiny_model

from pipeline.errors import ModelError
from pipeline.models import Checkpoint, identify, load_tokenizer, resolve
from pipeline.plan import ModelConfig
from pipeline.store import Store


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def model_id(path: Path, store: Store, adapter: Path | None = None) -> str:
    return identify(Checkpoint(path, adapter), store).model_id


def test_a_copy_elsewhere_is_the_same_model(tiny_model: Path, copy: Path, store: Store) -> None:
    assert model_id(tiny_model, store) == model_id(copy, store)


def test_another_seed_is_another_model(tiny_model: Path, tmp_path: Path, store: Store) -> None:
    assert model_id(tiny_model, store) != model_id(build_tiny_model(tmp_path / "o", 1), store)


def test_a_flipped_byte_with_its_old_mtime_is_another_model(copy: Path, store: Store) -> None:
    before = model_id(copy, store)
    weights = copy / "model.safetensors"
    stat = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_mtime_ns == stat.st_mtime_ns
    assert model_id(copy, store) != before


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("rope_parameters", {"rope_theta": 7.0, "rope_type": "default"}, False),
        ("rms_norm_eps", 0.5, False),
        ("_name_or_path", "elsewhere", True),
        ("transformers_version", "0.0", True),
    ],
)
def test_config_counts_but_for_names_and_versions(
    copy: Path, store: Store, key: str, value: object, same: bool
) -> None:
    before = model_id(copy, store)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    assert (model_id(copy, store) == before) is same


def test_an_adapter_makes_another_model(tiny_model: Path, tmp_path: Path, store: Store) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    adapter = tmp_path / "adapter"
    first = model_id(tiny_model, store, adapter)
    assert first != model_id(tiny_model, store)
    config = json.loads((adapter / "adapter_config.json").read_text())
    shuffled = {**config, "target_modules": config["target_modules"][::-1]}
    shuffled["base_model_name_or_path"] = "moved"
    (adapter / "adapter_config.json").write_text(json.dumps(shuffled))
    assert model_id(tiny_model, store, adapter) == first
    (adapter / "adapter_config.json").write_text(json.dumps({**shuffled, "lora_alpha": 99}))
    assert model_id(tiny_model, store, adapter) != first


def test_hashes_are_remembered(copy: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_id(copy, store)

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("pipeline.models.file_digest", fail)
    assert model_id(copy, store) == before


def test_only_safetensors_and_no_code(copy: Path, store: Store) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ModelError, match="its own code"):
        resolve(ModelConfig(checkpoint=str(copy)), store)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        resolve(ModelConfig(checkpoint=str(copy)), store)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("packaged:nothing", "smollm2-135m-instruct"),
        ("/no/such/place", "no such directory"),
        ("someone/no-such-model", "no such directory, and not to be had from the hub"),
    ],
)
def test_a_missing_checkpoint_is_named(checkpoint: str, message: str, store: Store) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(ModelConfig(checkpoint=checkpoint), store)


def test_a_directory_without_tokeniser_is_named(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokeniser"):
        load_tokenizer(Checkpoint(copy))


def test_the_packaged_model_answers(packaged_model: Checkpoint) -> None:
    """It is a real model: it knows a capital, and the untrained control does not."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(packaged_model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = AutoModelForCausalLM.from_pretrained(packaged_model.path)
    answers = []
    for candidate in (model, AutoModelForCausalLM.from_config(model.config)):
        with torch.inference_mode():
            out = candidate.generate(**ids, max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
    assert "Paris" in answers[0]
    assert "Paris" not in answers[1]
