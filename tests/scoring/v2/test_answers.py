"""Answers that must not be believed, and engines that die."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ScoringError
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig
from pipeline.scoring.engines.base import Engine, EngineDied, Group
from pipeline.scoring.engines.vllm_engine import VllmEngine
from pipeline.scoring.workers import Opening, workers
from scoring.oracle import (
    Oracle,
    largest_difference,
    scored,
)
from scoring.v2.desk import Over, config_of, row
from scoring.v2.fake_vllm import FakeLLM, Faults


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
