"""The torch engine on a GPU: run by `pytest -m gpu tests/scoring/test_torch_gpu.py`.

Values are those of transformers in float64 on the CPU, of real text under the packaged model and of
tiny random models of many families.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import torch
from support import measured

from pipeline.models import Checkpoint, context_length, load_model
from pipeline.plan import Extra, ModelConfig, ScoringConfig
from pipeline.scoring import run
from pipeline.scoring.engines.base import Group
from pipeline.scoring.engines.forward import Forward
from pipeline.scoring.engines.forward import model as model_module
from pipeline.scoring.engines.torch_engine import TorchEngine, found_device_class
from pipeline.scoring.ledger import read_logprobs, read_unscored
from pipeline.scoring.memory import OutOfMemory, score_within_memory
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.scoring.workers import _here
from pipeline.store import Store
from scoring.forward.families import FAMILIES, build, some_groups
from scoring.forward.test_extras import by_hand, flat
from scoring.forward.test_families import leaky
from scoring.forward.test_gradients import plain_float64, weighted
from scoring.oracle import (
    Oracle,
    completion,
    group,
    largest_difference,
    random_ids,
    sample_groups,
    scored,
    sequences_of,
    smallest_difference,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

FLOAT32, HALF = 2e-3, 2.0
"""Nats per sequence, from float64 and between two ways of computing."""
TOKEN = 2e-4
"""Nats per token in float32, as of a CPU."""
GRADIENT = 1e-3
"""Of a tensor's gradient, relative; float32."""


def config_of(checkpoint: Checkpoint, dtype: str = "float32") -> ModelConfig:
    return ModelConfig.model_validate(
        {"checkpoint": str(checkpoint.path), "engine": "torch", "dtype": dtype}
    )


@pytest.fixture(scope="module")
def groups(packaged_model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """Pairs of real text, of all lengths: half precision is off by more on what no text has."""
    store = Store(tmp_path_factory.mktemp("sample"), "test")
    groups = sample_groups(packaged_model, store, 1 << 20)
    of_two = [group for group in groups if len(group.completions) == 2]
    return of_two[:: len(of_two) // 20]


@pytest.fixture(scope="module")
def oracle(packaged_model: Checkpoint) -> Oracle:
    return Oracle(packaged_model)


@pytest.fixture(scope="module")
def exact(oracle: Oracle, groups: list[Group]) -> dict[str, float]:
    """Sums in float64, on the CPU."""
    return oracle.sums(groups)


@pytest.fixture(scope="module")
def engine(packaged_model: Checkpoint) -> Iterator[TorchEngine]:
    engine = TorchEngine(config_of(packaged_model), packaged_model)
    yield engine
    engine.close()


def test_there_is_a_gpu_and_the_scorer_says_so(
    packaged_model: Checkpoint, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.cuda.is_available(), "these tests are asked for with -m gpu, and need one"
    assert found_device_class().startswith("cuda-sm")
    here = scorer_key(store, config_of(packaged_model), packaged_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = scorer_key(store, config_of(packaged_model), packaged_model)
    assert on_cpu.numerics.device_class == "cpu"
    assert here.model == on_cpu.model
    assert here.numerics.numerics_id != on_cpu.numerics.numerics_id
    assert not here.numerics.comparable(on_cpu.numerics)


def test_float32_products_are_not_tf32(engine: TorchEngine) -> None:
    assert engine._forward.model.device.type == "cuda"
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=draw) for _ in range(2))
    right = a.double() @ b.double()

    def off() -> float:
        return float((a.cuda() @ b.cuda()).cpu().double().sub(right).abs().max())

    assert torch.get_float32_matmul_precision() == "highest"
    found = off()
    torch.set_float32_matmul_precision("high")
    try:
        control = off()
    finally:
        torch.set_float32_matmul_precision("highest")
    measured(f"float32 products {found:.1e} off; in TF32 (control) {control:.1e}")
    assert found < 1e-3
    assert control > 10 * found, "the control must fail"


# Values


def test_float32_equals_float64_on_the_cpu(
    engine: TorchEngine, oracle: Oracle, exact: dict[str, float], groups: list[Group]
) -> None:
    found = scored(engine, groups)
    apart = largest_difference(found, exact)
    untrained = oracle.untrained().sums(groups[:4])
    control = smallest_difference({i: found[i] for i in untrained}, untrained)
    measured(f"float32: {apart:.1e} nats from float64; untrained control {control:.1f}")
    assert apart <= FLOAT32
    assert control > 1, "the control must fail"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float64(
    dtype: str, packaged_model: Checkpoint, exact: dict[str, float], groups: list[Group]
) -> None:
    half = TorchEngine(config_of(packaged_model, dtype), packaged_model)
    found = scored(half, groups)
    again = scored(half, groups)
    plain = in_padded_rows(half, groups)
    shared = half.sharing.shared
    half.close()
    apart = largest_difference(found, exact)
    signed = float(np.mean([found[i] - exact[i] for i in found]))
    ways = largest_difference(found, plain)
    measured(
        f"{dtype}: {apart:.1e} nats from float64, {signed:+.1e} on average; padded rows "
        f"{ways:.1e} from shared prompts"
    )
    assert shared
    assert again == found, "equal calls, equal numbers"
    assert FLOAT32 < apart <= HALF
    assert ways <= HALF


def in_padded_rows(
    engine: TorchEngine, groups: list[Group], batch_tokens: int = 8192
) -> dict[str, float]:
    packs, pads = engine._packs, engine._pads
    engine._packs, engine._pads = False, True
    try:
        return scored(engine, groups, batch_tokens)
    finally:
        engine._packs, engine._pads = packs, pads


def test_prompts_are_shared_and_the_numbers_are_those_of_padded_rows(
    engine: TorchEngine, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.sharing.shared, engine.sharing.reason
    assert engine._packs
    plain = in_padded_rows(engine, groups)
    seen: list[int] = []
    body = type(engine._forward._inner.base_model)
    forward = body.forward

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(keywords["input_ids"].numel())
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(body, "forward", counted)
    found = scored(engine, groups)
    n_shared, n_all = sum(seen), sum(g.n_tokens for g in groups)
    apart = largest_difference(found, plain)
    measured(
        f"shared prompts: {n_shared} tokens in {len(seen)} passes for {n_all}; {apart:.1e} nats "
        "from padded rows"
    )
    assert n_shared < 0.8 * n_all
    assert apart <= FLOAT32
    alone = scored(engine, groups[:5], 0)
    assert largest_difference(alone, {i: found[i] for i in alone}) <= FLOAT32


def test_two_runs_give_the_same_bits(engine: TorchEngine, groups: list[Group]) -> None:
    one, two = (engine.score(groups, 4096) for _ in range(2))
    other = engine.score(groups, 512)
    equal, n = 0, 0
    for a, b, c in zip(one, two, other, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            np.testing.assert_array_equal(x, y)
            equal, n = equal + int((x == z).sum()), n + len(x)
    measured(f"in other batches {equal} of {n} tokens have the same bits")


def test_extras_equal_those_of_float64(
    engine: TorchEngine, oracle: Oracle, groups: list[Group]
) -> None:
    some, asked = groups[:6], get_args(Extra)
    plain = engine.score(some, 4096)
    found = engine.score_with_extras(some, 4096, asked)
    for a, b in zip(plain, found, strict=True):
        for logprobs, scores in zip(a, b, strict=True):
            np.testing.assert_array_equal(scores.logprobs, logprobs)
    right, warm = by_hand(oracle, some), by_hand(oracle, some, temperature=1.2)
    for extra in asked:
        worst = float(np.abs(flat(found, extra) - right[extra]).max())
        control = float(np.abs(flat(found, extra) - warm[extra]).mean())
        measured(f"{extra}: {worst:.1e} nats from float64; another temperature {control:.2f}")
        assert worst < 10 * TOKEN
        assert control > 100 * TOKEN, "the control must fail"


# Families


def largest_error(logprobs: list[list[torch.Tensor]], groups: list[Group], oracle: Oracle) -> float:
    """Per token, over all completions."""
    return max(
        float(np.abs(row.detach().cpu().numpy() - right).max())
        for g, rows in zip(groups, logprobs, strict=True)
        for c, row in zip(g.completions, rows, strict=True)
        for right in [oracle.logprobs(g.prompt_ids, c.ids)[c.scored]]
    )


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "sdpa") for name in FAMILIES), ("llama", "eager"), ("gemma3", "eager")],
)
def test_every_family_gives_float64s_numbers_and_gradients(
    name: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    checkpoint = build(tmp_path, family)
    loaded = load_model(checkpoint, dtype="float32", attention=attention, device="cuda")
    forward, oracle = Forward(loaded), Oracle(checkpoint, family.oracle)
    assert forward.sharing.shared == family.shares, forward.sharing.reason
    worst = leaked = 0.0
    for seed in range(2):
        groups = some_groups(seed)
        with torch.inference_mode():
            worst = max(worst, largest_error(forward.logprobs(groups), groups, oracle))
            worst = max(worst, largest_error(forward.padded(groups), groups, oracle))
            with monkeypatch.context() as patched:
                patched.setattr(model_module, "grow", leaky)
                leaked = max(leaked, largest_error(forward.logprobs(groups), groups, oracle))
    off = math.nan
    if family.shares:
        groups = some_groups(1)
        torch.autograd.backward(weighted([r for rows in forward.logprobs(groups) for r in rows]))
        found = {n: p.grad for n, p in loaded.named_parameters() if p.grad is not None}
        right = plain_float64(checkpoint, groups)
        assert found.keys() == right.keys()
        size = max(float(g.norm()) for g in right.values())
        off = max(
            float((found[n].cpu().double() - g).norm()) / max(float(g.norm()), 1e-3 * size)
            for n, g in right.items()
        )
    measured(
        f"{name}, {attention}: {worst:.1e} nats per token, gradients {off:.1e}; leaky control "
        f"{leaked:.2f}; exact {forward.sharing.exact}"
    )
    assert worst < TOKEN
    if family.shares:
        assert off < GRADIENT
        assert leaked > 0.05, "the control must fail"


# Memory


class Watched:
    """An engine that notes how many rows it was asked for and whether it ran out of memory."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.sharing = engine.sharing
        self.calls: list[tuple[int, bool]] = []

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        self.calls.append((sum(len(g.completions) for g in groups), False))
        found = self._engine.score(groups, batch_tokens)
        self.calls[-1] = (self.calls[-1][0], True)
        return found

    def close(self) -> None:
        pass


@pytest.fixture
def scarce() -> Iterator[Any]:
    """Sets how many MiB more than now this process may take on the GPU; all of it afterwards."""

    def allow(n_mib: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + n_mib * 2**20) / total
        )

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def of_one_length(n: int) -> list[Group]:
    """So many pairs of random ids, of 300 tokens a sequence."""
    return [
        group(
            random_ids(100, 3 * i),
            completion(f"{i:04} a", random_ids(200, 3 * i + 1)),
            completion(f"{i:04} b", random_ids(200, 3 * i + 2)),
        )
        for i in range(n)
    ]


def test_a_real_out_of_memory_is_halved_with_the_same_values_in_order(
    engine: TorchEngine, scarce: Any
) -> None:
    work = of_one_length(24)
    expected = engine.score(work, 1 << 20)
    watched = Watched(engine)
    scarce(150)
    found = score_within_memory(watched, work, 1 << 20)
    measured(f"48 rows in calls of {[n if ok else -n for n, ok in watched.calls]}, - for failed")
    assert watched.calls[0] == (48, False)
    assert 2 <= sum(ok for _, ok in watched.calls) < 48
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert not isinstance(x, OutOfMemory)
            np.testing.assert_allclose(x, y, atol=TOKEN, rtol=0)
    assert not np.allclose(expected[0][0], expected[1][0], atol=TOKEN), "another row is another"


def test_a_row_that_fits_nowhere_is_on_record_and_the_others_are_scored(
    packaged_model: Checkpoint,
    engine: TorchEngine,
    store: Store,
    scarce: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = context_length(packaged_model) or 8192
    long = group(random_ids(context - 50, 5), completion("long", random_ids(50, 6)))
    work = [long, *of_one_length(6)]
    sequences = sequences_of(work)
    (too_long,) = sequences.filter(pl.col("n_prompt") > 1000)["sequence_id"]
    config = config_of(packaged_model)
    key = scorer_key(store, config, packaged_model)
    monkeypatch.setattr(run, "workers", lambda opening, numerics, n: _here(opening))
    scarce(150)
    result = score_sequences(
        *("m", key, config, packaged_model, sequences, ScoringConfig(batch_tokens=1 << 20)),
        lambda *_: Watched(engine),
    )
    unscored = read_unscored(key)
    assert unscored["sequence_id"].to_list() == [too_long]
    assert unscored["rule"].to_list() == ["out_of_memory"]
    assert "CUDA out of memory" in unscored["detail"][0]
    assert (result.n_scored, result.n_unscored) == (12, 1)
    assert result.null_test.passed
    assert read_logprobs(key).height == 12


# A pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_in_a_process_of_its_own_passes_the_null_test(
    dtype: str,
    packaged_model: Checkpoint,
    store: Store,
    exact: dict[str, float],
    groups: list[Group],
) -> None:
    sequences = sequences_of(groups)
    config = config_of(packaged_model, dtype)
    key = scorer_key(store, config, packaged_model)
    settings = ScoringConfig(commit_rows=11, null_test_rows=16)
    extras: list[Extra] = ["entropy"]
    result = score_sequences("m", key, config, packaged_model, sequences, settings, extras=extras)
    test = result.null_test
    measured(
        f"null test in {dtype}: repeat {test.repeat:.1e}, noise floor {test.noise_floor:.1e}, "
        f"ledger {test.ledger:.1e} nats; {result.tokens_per_second:.0f} tokens/s"
    )
    assert test.repeat == 0.0
    assert test.passed
    held = read_logprobs(key)
    assert held.height == result.n_scored == sequences.height
    assert math.fsum(held["logprob"]) == pytest.approx(
        math.fsum(exact.values()), abs=(FLOAT32 if dtype == "float32" else HALF) * held.height
    )
