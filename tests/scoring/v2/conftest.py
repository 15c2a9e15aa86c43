"""A machine with a GPU and vLLM's V2 runner, or so the engine believes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.models import Checkpoint
from pipeline.scoring.engines import vllm_engine
from pipeline.scoring.engines.vllm_engine import VllmEngine
from scoring.oracle import (
    Oracle,
    build_adapter,
    build_model_for_vllm,
)
from scoring.v2.desk import CONTEXT, Over, config_of
from scoring.v2.fake_vllm import FakeLLM, Faults


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    return build_model_for_vllm(directory, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="package")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="package")
def oracle(base: Path) -> Oracle:
    return Oracle(Checkpoint(base))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "found_device_class", lambda: "cuda-sm90")
    # With vLLM imported it takes a second per engine, and of a fake there is nothing to collect.
    monkeypatch.setattr(vllm_engine, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


@pytest.fixture
def over_fake(base: Path) -> Iterator[Over]:
    """Open an engine over a fake `LLM`; both are returned."""
    opened: list[VllmEngine] = []

    def open_(
        faults: Faults | None = None,
        adapter: Path | None = None,
        longest: int = 170,
        load: Callable[[dict[str, Any]], FakeLLM] | None = None,
        **vllm: Any,
    ) -> tuple[VllmEngine, FakeLLM]:
        fakes: list[FakeLLM] = []

        def keep(arguments: dict[str, Any]) -> FakeLLM:
            fakes.append(load(arguments) if load else FakeLLM(arguments, faults))
            return fakes[0]

        opened.append(VllmEngine(config_of(base, **vllm), Checkpoint(base, adapter), longest, keep))
        return opened[-1], fakes[0]

    yield open_
    for engine in opened:
        engine.close()
