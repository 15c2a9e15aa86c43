"""vLLM loads a merged export, on a CPU, and gives the adapter's numbers."""

from pathlib import Path

import pytest
from scoring.oracle import (
    Oracle,
    build_model_for_vllm,
    largest_difference,
    random_groups,
    scored,
    smallest_difference,
)
from support import measured

from pipeline.export.merged import merged_policy
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, VllmConfig
from pipeline.scoring.engines.vllm_engine import VllmEngine
from pipeline.store import Store
from policies.exports import made_by_hand


@pytest.mark.slow
def test_vllm_loads_a_merged_export(store: Store, tmp_path: Path) -> None:
    base = build_model_for_vllm(tmp_path / "base", max_position_embeddings=192)
    adapter = made_by_hand(store, base)
    merged = Checkpoint(merged_policy(store, adapter, base))
    groups = random_groups(1, 6)
    config = ModelConfig(
        checkpoint=str(merged.path), engine="vllm", vllm=VllmConfig(cpu_kv_cache_gib=0.25)
    )
    engine = VllmEngine(config, merged, 170)
    try:
        found = scored(engine, groups)
    finally:
        engine.close()
    largest = largest_difference(found, Oracle(Checkpoint(base, adapter)).sums(groups))
    control = smallest_difference(found, Oracle(Checkpoint(base)).sums(groups))
    measured(
        f"{len(found)} sequences by vLLM from a merged export: at most {largest:.1e} nats from "
        f"the adapter in float64; the base at least {control:.1e}"
    )
    assert largest <= 1e-3
    assert control > 1e-2, "the control must fail"
