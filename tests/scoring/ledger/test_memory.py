"""Out of memory and dying engines (F12): halves down to a row, the rest as if nothing had been."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ScoringError
from pipeline.plan import ScoringConfig
from pipeline.scoring.engines.base import EngineDied, Group, groups_of
from pipeline.scoring.ledger import read_unscored, verify_ledger
from pipeline.scoring.memory import OutOfMemory, halved, is_out_of_memory, score_within_memory
from pipeline.scoring.run import ScoringResult, score_sequences
from scoring.ledger.desk import CHECKPOINT, CONFIG, everything, fake_key, made_sequences


class OutOfMemoryError(RuntimeError):
    """As torch has one."""


FAULTS: dict[str, Exception] = {
    "cuda": OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": MemoryError("cannot allocate"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "died": EngineDied("the engine's process ended"),
}


class SmallEngine(FakeEngine):
    """Fails with more than `most` rows at once, or with any of the `poison`."""

    def __init__(self, fault: str, most: int, poison: frozenset[str]) -> None:
        super().__init__()
        self.fault, self.most, self.poison = fault, most, poison
        self.calls: list[int] = []

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        ids = [c.sequence_id for group in groups for c in group.completions]
        self.calls.append(len(ids))
        if len(ids) > self.most or self.poison & set(ids):
            raise FAULTS[self.fault]
        return super().score(groups, batch_tokens)


def completions_of(groups: Sequence[Group]) -> list[str]:
    return [c.sequence_id for group in groups for c in group.completions]


@st.composite
def grouped(draw: st.DrawFn) -> list[Group]:
    """Up to eight groups of up to nine completions."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    sequences = made_sequences(math.ceil(sum(sizes) / 2), seed=draw(st.integers(0, 99)))
    pool = [c for group in groups_of(sequences) for c in group.completions]
    found, at = [], 0
    for size in sizes:
        found.append(Group(np.arange(3, 7, dtype=np.int32), tuple(pool[at : at + size])))
        at += size
    return found


@settings(max_examples=200, deadline=None)
@given(groups=grouped())
def test_halves_are_the_whole_in_order_and_end_with_single_rows(groups: list[Group]) -> None:
    n = len(completions_of(groups))
    halves = halved(groups)
    if n == 1:
        assert halves is None
        return
    assert halves is not None
    assert completions_of(halves[0]) + completions_of(halves[1]) == completions_of(groups)
    for half in halves:
        size = len(completions_of(half))
        assert n // 4 <= size <= n - n // 4
        assert size > 0
        assert all(group.completions for group in half)


@settings(max_examples=200, deadline=None)
@given(
    groups=grouped(),
    most=st.integers(0, 20),
    fault=st.sampled_from([name for name in FAULTS if name != "died"]),
    data=st.data(),
)
def test_values_and_order_are_those_of_an_engine_with_memory(
    groups: list[Group], most: int, fault: str, data: st.DataObject
) -> None:
    ids = completions_of(groups)
    poison = frozenset(data.draw(st.lists(st.sampled_from(ids), max_size=3)))
    engine = SmallEngine(fault, most, poison)
    found = score_within_memory(engine, groups, 0)
    expected = FakeEngine().score(groups, 0)
    assert [len(group) for group in found] == [len(group) for group in expected]
    rows = [row for group in found for row in group]
    for name, row, value in zip(ids, rows, [v for g in expected for v in g], strict=True):
        if name in poison or most == 0:
            assert isinstance(row, OutOfMemory)
            assert str(FAULTS[fault]) in row.detail
        else:
            np.testing.assert_array_equal(row, value)
    assert len(engine.calls) <= 2 * len(ids) - 1


def a_pass(root: Path, sequences: pl.DataFrame, engines: Iterator[SmallEngine]) -> ScoringResult:
    return score_sequences(
        "m",
        fake_key(root),
        CONFIG,
        CHECKPOINT,
        sequences,
        ScoringConfig(commit_rows=7, null_test_rows=3),
        lambda *_: next(engines),
    )


def whole_passes(n_examples: int) -> None:
    """Passes into a ledger: with every fault, every limit and up to two rows that never fit."""

    @settings(max_examples=n_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        n_prompts=st.integers(1, 8),
        seed=st.integers(0, 20),
        most=st.integers(1, 16),
        fault=st.sampled_from(sorted(FAULTS)),
        data=st.data(),
    )
    def run(n_prompts: int, seed: int, most: int, fault: str, data: st.DataObject) -> None:
        sequences = made_sequences(n_prompts, seed)
        poison = frozenset(
            data.draw(st.lists(st.sampled_from(sequences["sequence_id"].to_list()), max_size=2))
        )
        opened: list[SmallEngine] = []

        def engines() -> Iterator[SmallEngine]:
            while True:
                opened.append(SmallEngine(fault, most, poison))
                yield opened[-1]

        with TemporaryDirectory() as folder:
            root = Path(folder)
            result = a_pass(root, sequences, engines())
            key = fake_key(root)
            good = fake_key(root / "good")
            score_sequences(
                "m", good, CONFIG, CHECKPOINT, sequences, ScoringConfig(), lambda *_: FakeEngine()
            )
            expected = everything(good)
            fits = ~pl.col("sequence_id").is_in(sorted(poison))
            assert everything(key).equals(expected.filter(fits))
            unscored = read_unscored(key)
            assert unscored["sequence_id"].to_list() == sorted(poison)
            rule = "engine_died" if fault == "died" else "out_of_memory"
            assert unscored["rule"].to_list() == [rule] * len(poison)
            assert result.n_scored == sequences.height - len(poison)
            assert result.n_unscored == len(poison)
            n = sequences.height
            assert len(opened) <= (2 * n + 8 if fault == "died" else 1)
            assert verify_ledger(key.ledger) == []

    run()


def test_a_pass_loses_only_what_never_fits() -> None:
    whole_passes(40)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_thousand_passes_lose_only_what_never_fits() -> None:
    whole_passes(2000)


def test_where_nothing_fits_nothing_is_trusted(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    result = a_pass(tmp_path, write_sequences, iter([SmallEngine("cuda", 0, frozenset())]))
    assert (result.n_scored, result.n_unscored) == (0, 12)
    assert not result.null_test.passed
    assert read_unscored(fake_key(tmp_path)).height == 12


def test_other_errors_are_not_taken_for_it(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    for error in (ScoringError("wrong"), ValueError("out of range"), RuntimeError("shape [2, 3]")):
        assert not is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("out of memory"))

    class Broken(SmallEngine):
        def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        a_pass(tmp_path, write_sequences, iter([Broken("cuda", 9, frozenset())]))


def test_torch_s_own_error_is_known() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
