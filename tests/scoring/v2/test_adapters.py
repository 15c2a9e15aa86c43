"""Adapters: which are applied, and which refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import measured

from pipeline.errors import ModelError
from pipeline.models import Checkpoint
from pipeline.scoring.engines import vllm_engine
from pipeline.scoring.engines.vllm_adapter import lora_shape
from pipeline.scoring.engines.vllm_engine import VllmEngine
from scoring.oracle import (
    ALL_LINEAR,
    Oracle,
    build_adapter,
    change_json,
    largest_difference,
    random_groups,
    random_ids,
    scored,
    smallest_difference,
)
from scoring.v2.desk import Over, config_of, never
from scoring.v2.fake_vllm import FakeLLM


@pytest.fixture(autouse=True)
def a_fake_that_adapts_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernels do not, but so the fake can be held to the oracle's numbers."""
    monkeypatch.setattr(vllm_engine, "refuse_float32", lambda *_: None)


def test_adapter_and_base_rows_never_meet_in_a_call(
    base: Path, adapter: Path, over_fake: Over, oracle: Oracle
) -> None:
    groups = random_groups(6, 6)
    policy, fake = over_fake(adapter=adapter)
    reference, other = over_fake()
    merged = Oracle(Checkpoint(base, adapter)).sums(groups)
    of_base = oracle.sums(groups)
    found = scored(policy, groups)
    apart = smallest_difference(found, of_base)
    measured(f"V2 fake: un-adapted base as control {apart:.2f} nats from the policy")
    assert largest_difference(found, merged) <= 1e-3
    assert apart > 1e-3, "the control must fail"
    assert largest_difference(scored(reference, groups), of_base) <= 1e-3
    for llm, name in ((fake, "policy"), (other, None)):
        assert not llm.mixed
        assert {asked.adapter for call in llm.calls for asked in call.rows} == {name}
    assert other.arguments.get("enable_lora") is None


def test_the_fake_shows_what_a_mixed_call_would_do(
    adapter: Path, over_fake: Over, oracle: Oracle
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    _, fake = over_fake(adapter=adapter)
    ids = random_ids(20, 1)
    params = SamplingParams(
        max_tokens=1,
        prompt_logprob_token_ids=np.array(ids[10:])[:, None],
        prompt_logprob_start=9,
    )
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": ids}] * 2
    request = LoRARequest("policy", 1, str(adapter))
    alone = fake.generate(prompts[:1], [params], use_tqdm=False)
    both = fake.generate(prompts, [params] * 2, use_tqdm=False, lora_request=[None, request])
    assert fake.mixed
    expected = oracle.logprobs(np.array(ids[:10]), np.array(ids[10:]))
    np.testing.assert_allclose(alone[0].prompt_token_id_logprobs[:, 0], expected, atol=1e-4)
    assert np.abs(both[0].prompt_token_id_logprobs[:, 0] - expected).max() > 1e-2


def test_an_adapter_s_modules_and_rank_are_told_to_vllm(
    base: Path, over_fake: Over, tmp_path: Path
) -> None:
    some = build_adapter(base, tmp_path, r=5, target_modules=["v_proj", "down_proj"])
    assert lora_shape(some).modules == ["down_proj", "v_proj"]
    _, fake = over_fake(adapter=some)
    said = fake.arguments
    assert said["enable_lora"] is True
    assert said["max_lora_rank"] == 8
    assert said["lora_target_modules"] == ["down_proj", "v_proj"]


REFUSED_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "lm_head": ({"target_modules": [*ALL_LINEAR, "lm_head"]}, "output or embedding layer"),
    "embed_tokens": ({"target_modules": ["q_proj", "embed_tokens"]}, "output or embedding layer"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
    "a saved norm": ({"modules_to_save": ["norm"]}, "replaces whole modules"),
    "DoRA": ({"use_dora": True}, "is a DoRA adapter"),
    "biases": ({"bias": "all"}, "has trained biases"),
    "LoRA biases": ({"lora_bias": True}, "has trained biases"),
    "new tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "activated LoRA": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "replicated layers": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
}


@pytest.mark.parametrize("name", REFUSED_ADAPTERS)
def test_an_adapter_that_vllm_would_get_wrong_is_refused_with_what_to_do_instead(
    name: str, base: Path, tmp_path: Path
) -> None:
    fields, said = REFUSED_ADAPTERS[name]
    bad = build_adapter(base, tmp_path, **fields)
    with pytest.raises(ModelError, match=said) as raised:
        VllmEngine(config_of(base), Checkpoint(base, bad), 100, never)
    assert "merge it into full weights, or score it with engine: torch" in str(raised.value)
    assert str(bad) in str(raised.value)


def test_an_adapter_of_another_kind_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    change_json(other / "adapter_config.json", peft_type="IA3")
    with pytest.raises(ModelError, match="is of type IA3, not LORA"):
        VllmEngine(config_of(base), Checkpoint(base, other), 100, never)


def test_a_rank_above_what_vllm_takes_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has rank 513, above 512"):
        lora_shape(build_adapter(base, tmp_path, r=513, target_modules=["v_proj"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True, "r": 16},
        {"rank_pattern": {"q_proj": 16, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["rsLoRA", "patterns", "some layers", "gaussian"],
)
def test_adapters_that_vllm_applies_right_are_taken(
    fields: dict[str, Any], base: Path, over_fake: Over, tmp_path: Path
) -> None:
    good = build_adapter(base, tmp_path, **fields)
    engine, _ = over_fake(adapter=good)
    groups = random_groups(7, 2)
    merged = Oracle(Checkpoint(base, good)).sums(groups)
    assert largest_difference(scored(engine, groups), merged) <= 1e-3


def test_an_adapter_that_does_not_load_shows_when_the_engine_is_opened(
    base: Path, adapter: Path, over_fake: Over
) -> None:
    # vLLM would load it at the first request, and die of it.
    with pytest.raises(ModelError, match=r"rank 8 is greater than max_lora_rank 1"):
        over_fake(adapter=adapter, load=lambda said: FakeLLM({**said, "max_lora_rank": 1}))
