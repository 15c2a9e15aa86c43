"""The vLLM engine on a GPU, on the V2 runner: run by `pytest -m gpu tests/scoring`.

What the fake of `tests/scoring/v2` claims of that runner, asked of the runner itself. A tolerance
in float32 allows for attention kernels that multiply in TF32.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from support import measured

from pipeline.errors import ModelError, ScoringError
from pipeline.models import Checkpoint, context_length
from pipeline.plan import ModelConfig, ScoringConfig, VllmConfig
from pipeline.scoring.engines import open_engine
from pipeline.scoring.engines.base import Engine, EngineDied, Group
from pipeline.scoring.engines.torch_engine import TorchEngine, found_device_class
from pipeline.scoring.engines.vllm_engine import VllmEngine, vllm_numerics
from pipeline.scoring.ledger import read_logprobs
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.scoring.workers import Opening, Report, workers
from pipeline.store import Store
from scoring.oracle import (
    Oracle,
    build_adapter,
    completion,
    group,
    largest_difference,
    random_groups,
    random_ids,
    sample_groups,
    scored,
    sequences_of,
    smallest_difference,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

BLOCK = 16
LONGEST = 600
FLOAT32, HALF = 5e-3, 2.0
"""Nats per sequence that two ways of computing may be apart.

In half precision the torch engine's head is too: on a CPU that made 1.0 on the sample's replies.
"""


def config_of(checkpoint: Checkpoint, dtype: str = "float32", **vllm: Any) -> ModelConfig:
    settings = {"gpu_memory_utilization": 0.3, **vllm}
    return ModelConfig.model_validate(
        {
            "checkpoint": str(checkpoint.path),
            "engine": "vllm",
            "dtype": dtype,
            "vllm": VllmConfig(**settings),
        }
    )


@contextmanager
def vllm(
    checkpoint: Checkpoint, dtype: str = "float32", longest: int = LONGEST, **settings: Any
) -> Iterator[VllmEngine]:
    engine = VllmEngine(config_of(checkpoint, dtype, **settings), checkpoint, longest)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def adapter(packaged_model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    return build_adapter(packaged_model.path, directory, std=0.03)


@pytest.fixture(scope="module")
def groups(packaged_model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """Real text: half precision is off by more on tokens that no text would have."""
    store = Store(tmp_path_factory.mktemp("sample"), "test")
    return sample_groups(packaged_model, store, 40)


@pytest.fixture(scope="module")
def oracle(packaged_model: Checkpoint, groups: list[Group]) -> dict[str, float]:
    """Sums in float64, on the CPU."""
    return Oracle(packaged_model).sums(groups)


def test_there_is_a_gpu_and_the_plan_says_so(packaged_model: Checkpoint) -> None:
    assert torch.cuda.is_available(), "these tests are asked for with -m gpu, and need one"
    assert found_device_class().startswith("cuda-sm")
    numerics = vllm_numerics(config_of(packaged_model), packaged_model)
    assert numerics.runner == "v2 exact_ids eager"
    assert numerics.prefix_reuse == "blocks of its own choice"


def test_the_v2_runner_scores_exact_ids_equal_to_float64_transformers(
    packaged_model: Checkpoint, oracle: dict[str, float], groups: list[Group]
) -> None:
    with vllm(packaged_model) as engine:
        assert engine._llm.llm_engine.vllm_config.use_v2_model_runner is True
        assert engine._path == "exact_ids"
        found = scored(engine, groups)
    apart = largest_difference(found, oracle)
    untrained = Oracle(packaged_model).untrained().sums(groups[:4])
    control = smallest_difference({i: found[i] for i in untrained}, untrained)
    measured(f"V2, float32: {apart:.1e} nats from float64; untrained control {control:.1f}")
    assert apart <= FLOAT32
    assert control > 1, "the control must fail"


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", FLOAT32), ("bfloat16", HALF)])
def test_parity_to_the_torch_engine(
    dtype: str, allowed: float, packaged_model: Checkpoint, groups: list[Group]
) -> None:
    reference = TorchEngine(config_of(packaged_model, dtype), packaged_model, LONGEST)
    by_torch = scored(reference, groups)
    reference.close()
    with vllm(packaged_model, dtype) as engine:
        by_vllm = scored(engine, groups)
    apart = largest_difference(by_torch, by_vllm)
    signed = float(np.mean([by_vllm[i] - by_torch[i] for i in by_torch]))
    measured(f"torch and vLLM in {dtype}: {apart:.1e} nats apart, {signed:+.1e} on average")
    assert apart <= allowed


def test_bfloat16_is_really_bfloat16_and_its_head_float32(
    packaged_model: Checkpoint, oracle: dict[str, float], groups: list[Group]
) -> None:
    found = {}
    for head in ("float32", "model"):
        with vllm(packaged_model, "bfloat16", head_dtype=head) as engine:
            found[head] = scored(engine, groups)
    off = largest_difference(found["float32"], oracle)
    between = largest_difference(found["float32"], found["model"])
    measured(f"bfloat16: {off:.1e} nats from float64; its head in bfloat16 too: {between:.1e}")
    assert off > FLOAT32
    assert between > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_null_test_passes_and_everything_is_committed(
    dtype: str, packaged_model: Checkpoint, store: Store, groups: list[Group]
) -> None:
    sequences = sequences_of(groups)
    config = config_of(packaged_model, dtype)
    key = scorer_key(store, config, packaged_model)
    settings = ScoringConfig(workers=1, commit_rows=11, null_test_rows=16)
    result = score_sequences("m", key, config, packaged_model, sequences, settings)
    test = result.null_test
    measured(
        f"null test in {dtype}: repeat {test.repeat:.1e}, noise floor {test.noise_floor:.1e}, "
        f"ledger {test.ledger:.1e} nats; {result.tokens_per_second:.0f} tokens/s"
    )
    assert test.repeat == 0.0
    assert test.passed
    assert read_logprobs(key).height == sequences.height


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-3), ("bfloat16", HALF)])
def test_prefix_reuse_on_and_off(
    dtype: str, allowed: float, packaged_model: Checkpoint, groups: list[Group]
) -> None:
    groups = [*groups, *groups[:3]]
    found = {}
    for reuse in (True, False):
        with vllm(packaged_model, dtype, prefix_reuse=reuse) as engine:
            found[reuse] = scored(engine, groups)
            assert scored(engine, groups) == found[reuse], "equal calls, equal numbers"
    apart = largest_difference(found[True], found[False])
    measured(f"prefix reuse on and off in {dtype}: {apart:.1e} nats apart")
    assert apart <= allowed


def test_duplicates_and_shared_openings_across_block_boundaries(
    packaged_model: Checkpoint,
) -> None:
    groups = []
    for prompt in (1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK):
        for shared in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
            opening = random_ids(shared, shared)
            name = f"{prompt} {shared}"
            three = (
                completion(f"{name} longer", [*opening, 5, 6, 7]),
                completion(f"{name} shorter", [*opening, 8]),
                completion(f"{name} twice", [*opening, 8]),
            )
            groups.append(group([100 + shared, *random_ids(prompt - 1, 2)], *three))
    with vllm(packaged_model) as engine:
        found = scored(engine, groups)
    assert largest_difference(found, Oracle(packaged_model).sums(groups)) <= FLOAT32


def test_a_prefill_in_chunks_loses_no_row(
    packaged_model: Checkpoint, oracle: dict[str, float], groups: list[Group]
) -> None:
    with vllm(packaged_model, max_batched_tokens=64) as engine:
        assert largest_difference(scored(engine, groups), oracle) <= FLOAT32


def test_more_rows_than_the_head_takes_at_once(packaged_model: Checkpoint) -> None:
    # The V2 runner scores 1024 rows at a time.
    long = [group(random_ids(30, 1), completion("long", random_ids(1500, 2)))]
    with vllm(packaged_model, longest=1530) as engine:
        found = scored(engine, long)
    assert largest_difference(found, Oracle(packaged_model).sums(long)) <= 10 * FLOAT32


def test_a_row_as_long_as_the_context_is_scored_and_a_longer_one_refused(
    packaged_model: Checkpoint,
) -> None:
    context = context_length(packaged_model)
    assert context is not None
    full = [group(random_ids(context - 3, 1), completion("full", [5, 6, 7]))]
    longer = group(random_ids(context, 1), completion("longer", [5]))
    with vllm(packaged_model, longest=context + 1) as engine:
        with pytest.raises(ScoringError, match=f"sequence longer: {context + 1} tokens"):
            engine.score([longer], 8192)
        found = scored(engine, full)
    assert largest_difference(found, Oracle(packaged_model).sums(full)) <= FLOAT32


def test_a_refused_call_leaves_the_engine_alive(
    packaged_model: Checkpoint, groups: list[Group]
) -> None:
    with vllm(packaged_model) as engine:
        before = scored(engine, groups[:2])
        engine._limits = type(engine._limits)(engine._limits.vocab_size, None)
        with pytest.raises(ScoringError, match="vLLM refuses sequences") as raised:
            engine.score([*groups[:2], group(random_ids(LONGEST, 1), completion("l", [5]))], 8192)
        assert not isinstance(raised.value, EngineDied)
        assert scored(engine, groups[:2]) == before


def test_a_lora_policy_equals_its_merged_weights(
    packaged_model: Checkpoint,
    adapter: Path,
    oracle: dict[str, float],
    groups: list[Group],
) -> None:
    policy = Checkpoint(packaged_model.path, adapter)
    with vllm(policy, "bfloat16") as engine:
        found = scored(engine, groups)
    apart = largest_difference(found, Oracle(policy).sums(groups))
    control = largest_difference(found, oracle)
    measured(
        f"LoRA policy in bfloat16: {apart:.1e} nats from merged; base as control {control:.1f}"
    )
    assert apart <= HALF
    assert control > 2 * HALF, "the control must fail"


def test_a_lora_policy_in_float32_is_refused(packaged_model: Checkpoint, adapter: Path) -> None:
    """vLLM's kernel for adapters asserts half precision as the engine starts."""
    with (
        pytest.raises(ModelError, match="bfloat16 and float16 only"),
        vllm(Checkpoint(packaged_model.path, adapter)),
    ):
        pass


# Processes


def test_as_many_workers_as_gpus_up_to_two_give_the_ledger_of_one(
    packaged_model: Checkpoint, tmp_path: Path
) -> None:
    sequences = sequences_of(random_groups(2, 200, longest_prompt=200, longest=120))
    found: list[pl.DataFrame] = []
    for n_workers in (1, min(2, torch.cuda.device_count())):
        store = Store(tmp_path / str(len(found)), "test")
        config = config_of(packaged_model)
        key = scorer_key(store, config, packaged_model)
        settings = ScoringConfig(workers=n_workers, commit_rows=50)
        assert score_sequences(
            "m", key, config, packaged_model, sequences, settings
        ).null_test.passed
        found.append(read_logprobs(key))
    one, more = found
    assert one["sequence_id"].equals(more["sequence_id"])
    assert float((one["logprob"] - more["logprob"]).abs().max()) <= 1e-3  # type: ignore[arg-type]


def test_a_closed_engine_gives_the_memory_back(
    packaged_model: Checkpoint, groups: list[Group]
) -> None:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    environment = dict(os.environ)
    with vllm(packaged_model) as engine:
        scored(engine, groups[:2])
        assert torch.cuda.mem_get_info()[0] < free - 0.2 * total
    assert wait_for(lambda: torch.cuda.mem_get_info()[0] > free - 0.02 * total)
    assert dict(os.environ) == environment


def test_an_engine_core_that_is_killed_is_an_engine_that_died(
    packaged_model: Checkpoint, groups: list[Group]
) -> None:
    with vllm(packaged_model) as engine:
        before = scored(engine, groups[:2])
        kill_engine_cores()
        with pytest.raises(EngineDied):
            scored(engine, groups[:2])
    with vllm(packaged_model) as engine:
        assert scored(engine, groups[:2]) == before


def kill_engine_cores() -> None:
    cores = multiprocessing.active_children()
    assert cores, "on a GPU vLLM works in a process of its own"
    for core in cores:
        core.kill()
        core.join()


def score_and_kill(
    engine: Engine, item: tuple[Path, list[Group]], report: Report | None
) -> dict[str, float]:
    """The first time: kill this worker."""
    flag, groups = item
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return scored(engine, groups)


def test_a_killed_worker_is_replaced_and_finds_the_memory_free(
    packaged_model: Checkpoint, tmp_path: Path, groups: list[Group]
) -> None:
    # Most of the memory, so that an engine core left behind would not let another one load.
    config = config_of(packaged_model, gpu_memory_utilization=0.8)
    opening = Opening(open_engine, config, packaged_model, LONGEST)
    numerics = vllm_numerics(config, packaged_model)
    with workers(opening, numerics, 1) as run:
        (found,) = run(score_and_kill, [(tmp_path / "killed", groups[:2])], None)
    assert (tmp_path / "killed").exists()
    assert largest_difference(found, Oracle(packaged_model).sums(groups[:2])) <= FLOAT32


def wait_for(what: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.1)
    return what()
