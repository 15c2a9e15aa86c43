"""What vLLM's kernels on a GPU take in half precision only."""

from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.models import Checkpoint
from pipeline.scoring import engines
from pipeline.scoring.engines import engine_of, require_adapters
from pipeline.scoring.engines.vllm_engine import VllmEngine
from scoring.v2.desk import Over, config_of, never


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "found_device_class", lambda: "cuda-sm90")


def test_an_adapter_in_float32_is_refused_before_vllm_loads(
    base: Path, adapter: Path, over_fake: Over
) -> None:
    """On an H100 its kernel's own assertion ended the engine's start."""
    with pytest.raises(
        ModelError, match="bfloat16 and float16 only: score them with engine: torch"
    ):
        VllmEngine(config_of(base), Checkpoint(base, adapter), 100, never)
    _, fake = over_fake()
    assert "enable_lora" not in fake.arguments


def test_which_models_may_have_adapters(base: Path) -> None:
    config = config_of(base)
    with pytest.raises(ModelError, match="bfloat16 and float16 only"):
        require_adapters(config)
    require_adapters(config.model_copy(update={"dtype": "bfloat16"}))
    require_adapters(config.model_copy(update={"engine": "torch"}))
    require_adapters(config.model_copy(update={"engine": "auto"}))


@pytest.mark.parametrize(
    ("dtype", "engine"), [("float32", "torch"), ("bfloat16", "vllm"), ("float16", "vllm")]
)
def test_auto_is_what_can_score_the_policies_too(base: Path, dtype: str, engine: str) -> None:
    assert (
        engine_of(config_of(base).model_copy(update={"engine": "auto", "dtype": dtype})) == engine
    )
