"""The numbers, and the prefix cache they may come out of."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support import measured

from pipeline.models import Checkpoint
from pipeline.scoring.engines.base import EngineDied
from pipeline.scoring.engines.vllm_engine import vllm_numerics
from pipeline.scoring.null_test import null_test
from scoring.oracle import (
    Oracle,
    completion,
    group,
    largest_difference,
    random_groups,
    random_ids,
    scored,
    sequences_of,
    smallest_difference,
)
from scoring.v2.desk import BLOCK, Over, config_of, row
from scoring.v2.fake_vllm import JUNK, Faults


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
