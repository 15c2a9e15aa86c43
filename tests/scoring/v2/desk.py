"""What these tests share beside fixtures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan import ModelConfig, VllmConfig
from pipeline.scoring.engines.base import Group
from pipeline.scoring.engines.vllm_engine import VllmEngine
from scoring.oracle import (
    completion,
    group,
    random_ids,
)
from scoring.v2.fake_vllm import FakeLLM

BLOCK = 16
CONTEXT = 192

Over = Callable[..., tuple[VllmEngine, FakeLLM]]
"""Opens an engine over a fake `LLM`; both are returned."""


def config_of(base: Path, **vllm: Any) -> ModelConfig:
    return ModelConfig(checkpoint=str(base), engine="vllm", vllm=VllmConfig(**vllm))


def row(prompt: int, n: int, name: str = "s", seed: int = 0) -> Group:
    return group(random_ids(prompt, seed), completion(name, random_ids(n, seed + 1)))


def never(arguments: dict[str, Any]) -> Any:
    pytest.fail("it must be refused before a model is loaded")
