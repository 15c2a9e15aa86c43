"""The tree: every sequence is in it, what they share is in it once, and order does not count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.engines.forward.tree import WORTH_SHARING, common_length, grow

RUNS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def rows(*texts: str) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


@given(st.lists(RUNS, min_size=1, max_size=12), st.integers(0, 20))
def test_a_path_through_the_tree_is_the_sequence(texts: list[list[int]], n_common: int) -> None:
    sequences = [np.array([*[1] * n_common, *text], np.int32) for text in texts]
    tree = grow(sequences)
    ends = {int(run.path[-1]): run for run in tree.runs}
    for sequence, places in zip(sequences, tree.places, strict=True):
        np.testing.assert_array_equal(tree.ids[places], sequence)
        np.testing.assert_array_equal(tree.positions[places], np.arange(len(sequence)))
        np.testing.assert_array_equal(ends[int(places[-1])].path, places)
    starts = [run.start for run in tree.runs]
    assert starts == sorted(starts)
    for run in tree.runs:  # its own tokens end its path, and what it continues came before
        np.testing.assert_array_equal(
            run.path[run.position :], np.arange(run.start, run.start + run.n)
        )
        assert run.position == 0 or int(run.path[run.position - 1]) in ends
    assert sum(run.n for run in tree.runs) == len(tree.ids)


@given(st.data(), st.lists(RUNS, min_size=2, max_size=8, unique_by=tuple))
def test_the_order_of_the_sequences_does_not_count(
    data: st.DataObject, texts: list[list[int]]
) -> None:
    sequences = [np.array(text, np.int32) for text in texts]
    order = data.draw(st.permutations(range(len(texts))))
    one, other = grow(sequences), grow([sequences[i] for i in order])
    np.testing.assert_array_equal(one.ids, other.ids)
    for k, i in enumerate(order):
        np.testing.assert_array_equal(one.places[i], other.places[k])


@pytest.mark.parametrize(
    ("texts", "n_tokens"),
    [
        (["a common prompt: yes", "a common prompt: no"], 17 + 3 + 2),
        # A system prompt, then two prompts, then replies.
        (["system: be nice. A?x", "system: be nice. A?y", "system: be nice. B?zz"], 17 + 3 + 3 + 4),
        # The second goes on from the first; the third repeats it.
        (["one two three", "one two three four", "one two three"], 18),
        # Too little in common.
        (["common A", "common B"], 16),
        (["nothing", "else"], 11),
    ],
)
def test_what_is_shared_is_there_once(texts: list[str], n_tokens: int) -> None:
    assert WORTH_SHARING == 8
    assert len(grow(rows(*texts)).ids) == n_tokens


def test_a_long_chain_of_prefixes_grows() -> None:
    text = np.arange(30_000, dtype=np.int32)
    tree = grow([text[: 10 * n] for n in range(1, 3000)])
    assert len(tree.ids) == 29_990
    assert len(tree.runs) == 2999


def test_common_length() -> None:
    a, b = rows("abcd", "abxd")
    assert common_length(a, b) == 2
    assert common_length(a, a[:3]) == 3
    assert common_length(a, b[3:]) == 0
