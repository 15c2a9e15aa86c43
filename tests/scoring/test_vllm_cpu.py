"""The vLLM engine for real, on a CPU: its numbers, its traps, and what it does to this process."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import measured

from pipeline.errors import ModelError, ScoringError
from pipeline.models import Checkpoint, load_tokenizer
from pipeline.plan import ModelConfig, ScoringConfig, VllmConfig
from pipeline.scoring.engines.base import Completion, Engine, Group
from pipeline.scoring.engines.vllm_engine import VllmEngine, vllm_numerics
from pipeline.scoring.ledger import read_logprobs
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.scoring.workers import Opening, workers
from pipeline.store import Store
from scoring.oracle import (
    Oracle,
    build_adapter,
    build_model_for_vllm,
    change_json,
    completion,
    group,
    largest_difference,
    random_groups,
    random_ids,
    scored,
    sequences_of,
    smallest_difference,
)
from scoring.v2.fake_vllm import FakeLLM

CONTEXT = 192
BLOCK = 32
LONGEST = 170


class Slot:
    """The one vLLM engine that is open; a process holds no two at a time."""

    def __init__(self) -> None:
        self._open: tuple[Any, VllmEngine] | None = None

    def engine(self, checkpoint: Checkpoint, longest: int = LONGEST, **settings: Any) -> VllmEngine:
        """The engine so opened: the open one, if it is."""
        dtype = settings.pop("dtype", "float32")
        config = ModelConfig(
            checkpoint=str(checkpoint.path),
            engine="vllm",
            dtype=dtype,
            vllm=VllmConfig(cpu_kv_cache_gib=0.25, **settings),
        )
        key = (checkpoint, longest, config)
        if self._open is None or self._open[0] != key:
            self.close()
            self._open = key, VllmEngine(config, checkpoint, longest)
        return self._open[1]

    def close(self) -> None:
        """Before something else opens one."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


@pytest.fixture(scope="module")
def slot() -> Iterator[Slot]:
    slot = Slot()
    yield slot
    slot.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("base")
    return Checkpoint(build_model_for_vllm(directory, max_position_embeddings=CONTEXT))


@pytest.fixture(scope="module")
def oracle(base: Checkpoint) -> Oracle:
    return Oracle(base)


GROUPS = random_groups(1, 10)


# Where it stays as it was


def state_of_the_process() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "cores": os.sched_getaffinity(0),
        "set_num_threads": torch.set_num_threads,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)},
        "distributed": torch.distributed.is_initialized(),
        "frozen": gc.get_freeze_count() > 0,
    }


def test_a_closed_engine_leaves_environment_and_threads_as_they_were_and_another_one_opens(
    slot: Slot, base: Checkpoint
) -> None:
    slot.close()
    before = state_of_the_process()
    first = scored(slot.engine(base), GROUPS)
    assert os.environ.get("LD_PRELOAD") != before["environment"].get("LD_PRELOAD")
    assert torch.set_num_threads is not before["set_num_threads"], "or this shows nothing"
    slot.close()
    assert state_of_the_process() == before
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1, "it is torch's own again"
    torch.set_num_threads(before["threads"])
    assert scored(slot.engine(base), GROUPS) == first, "the second engine in this process"


# The numbers


def test_float32_sums_equal_float64_transformers(
    slot: Slot, base: Checkpoint, oracle: Oracle
) -> None:
    found = scored(slot.engine(base), GROUPS)
    largest = largest_difference(found, oracle.sums(GROUPS))
    control = smallest_difference(found, oracle.untrained().sums(GROUPS))
    measured(
        f"{len(found)} sequences of a tiny model: at most {largest:.1e} nats apart; "
        f"untrained control at least {control:.1e}"
    )
    assert largest <= 1e-3
    assert control > 1e-3, "the control must fail"


def test_a_row_with_inner_spans_scores_only_those_tokens(
    slot: Slot, base: Checkpoint, oracle: Oracle
) -> None:
    prompt, ids = random_ids(20, 1), random_ids(12, 2)
    parts = completion("parts", ids, (1, 3), (6, 7), (10, 12))
    ((some, all_),) = slot.engine(base).score([group(prompt, parts, completion("w", ids))], 8192)
    np.testing.assert_array_equal(some, all_[[1, 2, 6, 10, 11]])
    np.testing.assert_allclose(all_, oracle.logprobs(np.array(prompt), np.array(ids)), atol=2e-4)
    assert some.dtype == np.float32


def test_duplicate_rows_and_shared_openings_across_block_boundaries(
    slot: Slot, base: Checkpoint, oracle: Oracle
) -> None:
    engine = slot.engine(base)
    groups = []
    for prompt in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
        for shared in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
            opening = random_ids(shared, shared)
            name = f"{prompt} {shared}"
            pair = (
                completion(f"{name} longer", [*opening, 5, 6, 7]),
                completion(f"{name} shorter", [*opening, 8]),
                completion(f"{name} twice", [*opening, 8]),
            )
            groups.append(group([100 + shared, *random_ids(prompt - 1, 2)], *pair))
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3
    for one, values in zip(groups, engine.score(groups, 8192), strict=True):
        np.testing.assert_allclose(values[1], values[2], atol=1e-5, err_msg=str(one))


def test_equal_calls_give_equal_numbers(slot: Slot, base: Checkpoint) -> None:
    engine = slot.engine(base)
    first = scored(engine, GROUPS)
    scored(engine, GROUPS[:3])  # would fill the cache
    assert scored(engine, GROUPS) == first
    assert scored(engine, GROUPS, batch_tokens=0) == pytest.approx(first, abs=1e-3)


def test_bad_rows_are_refused_and_the_engine_lives_on(slot: Slot, base: Checkpoint) -> None:
    engine = slot.engine(base)
    before = scored(engine, GROUPS)
    bad = [
        Group(np.array([], np.int32), (completion("bad", [5]),)),
        Group(np.array([5], np.int32), (Completion("bad", np.array([], np.int32), ((0, 0),)),)),
        group([5], completion("bad", [100_000])),
        group([-1], completion("bad", [5])),
        Group(np.array([5.0]), (completion("bad", [6]),)),
        group([5] * LONGEST, completion("bad", [6])),
    ]
    for one in bad:
        with pytest.raises(ScoringError, match="sequence bad"):
            engine.score([*GROUPS, one], 8192)
    as_tuples = [
        Group(
            tuple(g.prompt_ids.tolist()),  # type: ignore[arg-type]
            tuple(replace(c, ids=tuple(c.ids.tolist())) for c in g.completions),  # type: ignore[arg-type]
        )
        for g in GROUPS
    ]
    assert scored(engine, as_tuples) == before, "it would hang if tuples reached it"


def test_the_fake_answers_as_the_engine_it_stands_for(
    slot: Slot, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests as raw as vLLM takes them: what is cached, what is refused, and the numbers."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    real = slot.engine(base)._llm
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    fake = FakeLLM(
        {
            "model": str(base.path),
            "dtype": "float32",
            "max_model_len": LONGEST + 1,
            "block_size": BLOCK,
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 2048,
        }
    )

    def ask(llm: Any, rows: list[Any], skip: bool = False, **fields: Any) -> list[Any]:
        fields = fields or {"prompt_logprobs": 0, "flat_logprobs": True}
        params = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                skip_reading_prefix_cache=skip,
                **fields,
            )
            for _ in rows
        ]
        answers: list[Any] = llm.generate(
            [{"prompt_token_ids": row} for row in rows], params, use_tqdm=False
        )
        return answers

    refused: list[tuple[list[Any], dict[str, Any]]] = [
        ([[5, 6], []], {}),
        ([[5, 6], [5] * (LONGEST + 1)], {}),
        ([[5, 6], [5] * (LONGEST + 2)], {}),
        ([[5, 301]], {}),
        ([[5, -1]], {}),
        ([[5, 6]], {"prompt_logprob_token_ids": np.array([[6]]), "prompt_logprob_start": 0}),
        ([[5, 6]], {"prompt_logprob_token_ids": np.array([6])}),
    ]
    for rows, fields in refused:
        said = []
        for llm in (real, fake):
            with pytest.raises(VLLMValidationError) as raised:
                ask(llm, rows, **fields)
            said.append(str(raised.value))
        assert said[0].startswith(said[1].rstrip(".")), "in the same words"
    assert real.reset_prefix_cache() is True
    assert fake.reset_prefix_cache() is True
    stem = random_ids(160, 5)
    draw = np.random.default_rng(0)
    rows = [
        [*stem[: draw.integers(0, 130)], *random_ids(int(draw.integers(1, 40)), i)]
        for i in range(40)
    ]
    rows += [rows[3], rows[7], [*stem[:64]], [*stem[:64]], [*stem[:65]]]
    for skip in (False, True, False):
        for mine, theirs in zip(ask(fake, rows, skip), ask(real, rows, skip), strict=True):
            assert mine.prompt_token_ids == theirs.prompt_token_ids
            assert mine.num_cached_tokens == theirs.num_cached_tokens
            assert len(mine.prompt_logprobs) == len(theirs.prompt_logprobs)
            cached = theirs.num_cached_tokens
            a, b = mine.prompt_logprobs, theirs.prompt_logprobs
            assert a.token_ids[cached:] == b.token_ids[cached:]
            np.testing.assert_allclose(a.logprobs[cached:], b.logprobs[cached:], atol=1e-3)


def test_scoring_through_the_ledger_passes_the_null_test_with_repeat_exactly_zero(
    slot: Slot, base: Checkpoint, oracle: Oracle, store: Store
) -> None:
    slot.close()
    sequences = sequences_of(GROUPS)
    config = ModelConfig(
        checkpoint=str(base.path), engine="vllm", vllm=VllmConfig(cpu_kv_cache_gib=0.25)
    )
    key = scorer_key(store, config, base)
    assert key.numerics.engine == "vllm"
    assert key.numerics.runner == "v1 flat eager"
    assert key.numerics.prefix_reuse == f"blocks of {BLOCK}"
    result = score_sequences("m", key, config, base, sequences, ScoringConfig(commit_rows=7))
    assert result.n_scored == sequences.height == 20
    assert result.null_test.passed
    assert result.null_test.repeat == 0.0
    measured(
        f"null test of vLLM on a CPU: noise floor {result.null_test.noise_floor:.1e} nats, "
        f"ledger {result.null_test.ledger:.1e}"
    )
    found = dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows())
    for row in sequences.iter_rows(named=True):
        prompt, ids = (np.array(row[f"{part}_ids"]) for part in ("prompt", "completion"))
        assert abs(found[row["sequence_id"]] - oracle.logprobs(prompt, ids).sum()) <= 1e-3


@pytest.mark.slow
def test_two_processes_agree_with_one_within_the_noise_floor(
    slot: Slot, base: Checkpoint, tmp_path: Path
) -> None:
    slot.close()
    sequences = sequences_of(GROUPS)
    config = ModelConfig(
        checkpoint=str(base.path), engine="vllm", vllm=VllmConfig(cpu_kv_cache_gib=0.25)
    )
    found = []
    for n_workers in (1, 2):
        key = scorer_key(Store(tmp_path / str(n_workers), "test"), config, base)
        settings = ScoringConfig(workers=n_workers, commit_rows=4)
        result = score_sequences("m", key, config, base, sequences, settings)
        assert result.null_test.passed
        found.append(dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows()))
    assert largest_difference(*found) <= 1e-4


def test_prefix_reuse_changes_nothing(slot: Slot, base: Checkpoint) -> None:
    groups = [*GROUPS, *GROUPS[:2]]
    on = scored(slot.engine(base), groups)
    off = scored(slot.engine(base, prefix_reuse=False), groups)
    apart = largest_difference(on, off)
    measured(f"prefix reuse on and off: {apart:.1e} nats apart")
    assert apart <= 1e-4


def test_a_prefill_in_chunks_loses_no_row(slot: Slot, base: Checkpoint, oracle: Oracle) -> None:
    engine = slot.engine(base, max_batched_tokens=64, attention_backend="CPU_ATTN")
    groups = [
        group(random_ids(3, 1), completion("long reply", random_ids(LONGEST - 3, 2))),
        group(
            random_ids(LONGEST - 10, 3),
            *(completion(f"long prompt {i}", random_ids(10, i)) for i in range(3)),
        ),
        *GROUPS,
    ]
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3


def test_a_row_exactly_as_long_as_the_context_is_scored_and_a_longer_one_refused(
    slot: Slot, base: Checkpoint, oracle: Oracle
) -> None:
    engine = slot.engine(base, longest=CONTEXT + 1)
    groups = [
        group(random_ids(100, 1), completion("half", random_ids(CONTEXT - 100, 2))),
        group(random_ids(CONTEXT - 1, 3), completion("last token", random_ids(1, 4))),
    ]
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3
    too_long = group(random_ids(CONTEXT, 5), completion("too long", [5]))
    with pytest.raises(ScoringError, match=f"sequence too long: {CONTEXT + 1} tokens"):
        engine.score([*groups, too_long], 8192)
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3


def test_bfloat16_is_really_bfloat16(slot: Slot, base: Checkpoint, oracle: Oracle) -> None:
    expected = oracle.sums(GROUPS)
    half = slot.engine(base, dtype="bfloat16")
    numerics = vllm_numerics(ModelConfig(checkpoint="x", engine="vllm", dtype="bfloat16"), base)
    assert (numerics.body_dtype, numerics.head_dtype) == ("bfloat16", "float32")
    float32 = vllm_numerics(ModelConfig(checkpoint="x", engine="vllm"), base)
    assert not numerics.comparable(float32)
    found = scored(half, GROUPS)
    off = {i: abs(found[i] - expected[i]) for i in expected}
    head = scored(slot.engine(base, dtype="bfloat16", head_dtype="model"), GROUPS)
    measured(
        f"bfloat16: {min(off.values()):.1e} to {max(off.values()):.1e} nats per sequence from "
        f"float64; its head in bfloat16 too: {largest_difference(found, head):.1e} from that"
    )
    assert max(off.values()) > 1e-2, "float32 would be nearer"
    assert largest_difference(found, head) > 1e-3


# Adapters


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 12, "layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ],
    ids=["all linear", "patterns, rsLoRA"],
)
def test_a_lora_policy_equals_its_merged_weights(
    fields: dict[str, Any], slot: Slot, base: Checkpoint, oracle: Oracle, tmp_path: Path
) -> None:
    policy = Checkpoint(base.path, build_adapter(base.path, tmp_path, **fields))
    found = scored(slot.engine(policy), GROUPS)
    largest = largest_difference(found, Oracle(policy).sums(GROUPS))
    control = smallest_difference(found, oracle.sums(GROUPS))
    measured(f"LoRA policy: {largest:.1e} nats from merged float64; base as control {control:.1e}")
    assert largest <= 1e-3
    assert control > 1e-3, "the control must fail"


def test_an_adapter_of_another_model_shows_when_the_engine_is_opened(
    slot: Slot, base: Checkpoint, tmp_path: Path
) -> None:
    other = build_model_for_vllm(tmp_path / "other", hidden_size=256)
    alien = build_adapter(other, tmp_path / "alien")
    with pytest.raises(ModelError, match=f"cannot load {alien}"):
        slot.engine(Checkpoint(base.path, alien))


# What cannot be loaded, and what dies


def test_a_checkpoint_that_vllm_cannot_load_is_a_model_error_and_the_next_one_loads(
    slot: Slot, base: Checkpoint, tmp_path: Path
) -> None:
    slot.close()
    before = dict(os.environ)
    bad = build_model_for_vllm(tmp_path)
    change_json(bad / "config.json", architectures=["NoSuchModel"], model_type="llama")
    with pytest.raises(ModelError, match=f"vLLM cannot load {bad}"):
        slot.engine(Checkpoint(bad))
    assert dict(os.environ) == before


def score_item(engine: Engine, item: list[Group], report: object) -> dict[str, float]:
    return scored(engine, item)


def test_an_engine_that_really_dies_is_replaced_and_a_good_one_works_after_it(
    slot: Slot, base: Checkpoint, oracle: Oracle, tmp_path: Path
) -> None:
    """A head of 8 dimensions kills vLLM on a CPU, but not before the first request."""
    slot.close()
    deadly = Checkpoint(build_model_for_vllm(tmp_path, hidden_size=32))
    opened = []

    def open_(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> VllmEngine:
        opened.append(checkpoint)
        return VllmEngine(config, checkpoint if len(opened) < 2 else base, longest)

    config = ModelConfig(checkpoint="x", engine="vllm", vllm=VllmConfig(cpu_kv_cache_gib=0.25))
    with workers(Opening(open_, config, deadly, LONGEST), vllm_numerics(config, base), None) as run:
        (found,) = run(score_item, [GROUPS], None)
    assert len(opened) == 2
    assert largest_difference(found, oracle.sums(GROUPS)) <= 1e-3


# A real model


@pytest.fixture
def conversations(packaged_model: Checkpoint) -> list[Group]:
    tokenizer = load_tokenizer(packaged_model)
    ask: Callable[[str], list[int]] = lambda text: tokenizer.apply_chat_template(  # noqa: E731
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    replies = {
        "What is the capital of France?": ["The capital of France is Paris.", "I do not know."],
        "Name three colours.": ["Red, green and blue.", "Red, green, and then there is none."],
        "Say nothing.": ["", "Well, " * 30],
    }
    return [
        group(
            ask(question),
            *(
                completion(f"{question} {i}", tokenizer.encode(f"{reply}<|im_end|>"))
                for i, reply in enumerate(pair)
            ),
        )
        for question, pair in replies.items()
    ]


def test_the_packaged_model_equals_float64_transformers(
    slot: Slot, packaged_model: Checkpoint, conversations: list[Group]
) -> None:
    found = scored(slot.engine(packaged_model, longest=256), conversations)
    oracle = Oracle(packaged_model)
    largest = largest_difference(found, oracle.sums(conversations))
    control = smallest_difference(found, oracle.untrained().sums(conversations))
    measured(
        f"{len(found)} sequences of the packaged model: at most {largest:.1e} nats apart; "
        f"untrained control at least {control:.1f}"
    )
    # vLLM's float32 log_softmax over 49,152 entries is itself off by up to 2.8e-3 a sequence.
    assert largest <= 3e-3
    assert control > 1, "the control must fail"
