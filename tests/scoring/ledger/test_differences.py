"""Numerics that change alone: the difference is on record, and audits may accept it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fake_engine import FAKE_NUMERICS, FakeEngine
from support import build_tiny_model, tokenized

from pipeline import stages
from pipeline.errors import PlanError
from pipeline.models import Checkpoint
from pipeline.names import key_of
from pipeline.plan import ModelConfig, Plan, load_plan
from pipeline.scoring.engines import numerics_of
from pipeline.scoring.engines.torch_engine import TorchEngine
from pipeline.scoring.ledger import read_logprobs, recorded_difference
from pipeline.store import Store
from scoring.ledger.desk import fake_key, score


def test_the_difference_is_recorded_with_its_n(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    old = fake_key(tmp_path)
    new = replace(old, numerics=replace(FAKE_NUMERICS, engine_version="2.0"))
    score(old, write_sequences.head(9))
    score(new, write_sequences.head(4))
    found = recorded_difference(new, old)
    assert found is not None
    assert (found.n, found.largest) == (4, 0.0)
    score(new, write_sequences, FakeEngine(salt="other"))
    found = recorded_difference(new, old)
    assert found is not None
    assert found.n == 9
    both = read_logprobs(new).join(read_logprobs(old), on="sequence_id")
    apart = [abs(row["logprob"] - row["logprob_right"]) for row in both.iter_rows(named=True)]
    assert found.largest == max(apart) > 1
    assert found.mean == pytest.approx(sum(apart) / 9)
    other_model = fake_key(tmp_path, "other").model
    assert recorded_difference(replace(new, model=other_model), old) is None


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Raise the engine's version: only the numerics change."""

    def upgrade() -> None:
        def later(config: ModelConfig, checkpoint: Checkpoint) -> Any:
            return replace(numerics_of(config, checkpoint), engine_version="99.0")

        monkeypatch.setattr("pipeline.scoring.run.numerics_of", later)

    return upgrade


@pytest.fixture
def audit(write_plan: Callable[..., Path], tmp_path: Path, tiny_model: Path) -> Callable[..., Any]:
    other = build_tiny_model(tmp_path / "policy", seed=3)

    def made(accept: float | None) -> tuple[Plan, Store]:
        return tokenized(
            write_plan(
                objectives={},
                models={
                    "base": {"checkpoint": str(tiny_model)},
                    "other": {"checkpoint": str(other)},
                },
                audits={"a": {"reference": "base", "policy": "other"}},
                scoring={"accept_equivalent": accept, "null_test_rows": 5},
            )
        )

    return made


def test_an_audit_goes_on_with_the_numbers_before_an_upgrade(
    audit: Callable[..., Any], upgraded: Callable[[], None]
) -> None:
    plan, store = audit(1e-3)
    before = [stages.score(plan, store, name) for name in ("base", "a")]
    rewards = stages.compute_rewards(plan, store, "a")
    upgraded()
    after = [stages.score(plan, store, name) for name in ("base", "a")]
    for old, new in zip(before, after, strict=True):
        assert new.key == old.key
        assert (new.n_wanted, new.n_reused, new.n_scored) == (24, 24, 0)
        assert new.model_loaded, "for a sample"
    assert stages.compute_rewards(plan, store, "a").digest == rewards.digest
    again = [stages.score(plan, store, name) for name in ("base", "a")]
    assert not any(result.model_loaded for result in again)


def test_the_plan_s_digest_knows_what_is_accepted(audit: Callable[..., Any]) -> None:
    assert len({audit(accept)[0].digest for accept in (None, 1e-3, 1e-2)}) == 3


def test_without_leave_everything_is_scored_anew(
    audit: Callable[..., Any], upgraded: Callable[[], None]
) -> None:
    plan, store = audit(None)
    before = [stages.score(plan, store, name) for name in ("base", "a")]
    upgraded()
    after = [stages.score(plan, store, name) for name in ("base", "a")]
    assert [result.n_scored for result in after] == [24, 24]
    assert all(new.key != old.key for old, new in zip(before, after, strict=True))


def test_one_that_differs_takes_its_reference_along(
    audit: Callable[..., Any], upgraded: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of a subtraction are of one numerics: the reference's sample alone was close."""
    plan, store = audit(1e-3)
    for name in ("base", "a"):
        stages.score(plan, store, name)
    upgraded()
    assert stages.score(plan, store, "base").n_reused == 24
    real = TorchEngine.score

    def off(engine: TorchEngine, groups: Any, batch_tokens: int) -> Any:
        scored = real(engine, groups, batch_tokens)
        return [[row - 0.01 for row in group] for group in scored]

    with monkeypatch.context() as patched:
        patched.setattr(TorchEngine, "score", off)
        result = stages.score(plan, store, "a")
    assert result.n_wanted == 24
    assert result.n_reused == 5, "the sample"
    assert result.n_scored == 19
    keys = [key_of(plan, store, name)[0] for name in ("base", "a")]
    assert [key.numerics.engine_version for key in keys] == ["99.0"] * 2
    assert all(read_logprobs(key).height == 24 for key in keys)
    assert stages.compute_rewards(plan, store, "a").n_rows == 12


def test_what_is_trained_is_of_today(write_plan: Callable[..., Path]) -> None:
    path = write_plan(scoring={"accept_equivalent": 0.1})
    with pytest.raises(PlanError, match=r"scoring\.accept_equivalent"):
        load_plan(path)
