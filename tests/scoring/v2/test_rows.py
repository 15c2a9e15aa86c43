"""Rows that must not reach the engine."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ScoringError
from pipeline.scoring.engines.base import Completion, EngineDied, Group
from scoring.oracle import (
    Oracle,
    completion,
    group,
    largest_difference,
    random_ids,
    scored,
)
from scoring.v2.desk import CONTEXT, Over, row

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
