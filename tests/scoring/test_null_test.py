"""The null test passes on an honest ledger and fails when identity lies."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_engine import FakeEngine
from safetensors.torch import load_file, save_file

from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.engines.base import Group
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store


class NoisyEngine(FakeEngine):
    """Its numbers depend on the batch by a twentieth of a nat per sequence."""

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        scored = super().score(groups, batch_tokens)
        off = np.float32(0.05 if batch_tokens else 0.0)
        return [[row - off / len(row) for row in rows] for rows in scored]


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_an_honest_ledger_passes(copy: Path, store: Store, write_sequences: pl.DataFrame) -> None:
    config, checkpoint = ModelConfig(checkpoint=str(copy)), Checkpoint(copy)
    key = scorer_key(store, config, checkpoint)
    result = score_sequences("m", key, config, checkpoint, write_sequences, ScoringConfig())
    test = result.null_test
    assert test.passed
    assert test.n == 8
    assert test.repeat == 0.0
    assert test.ledger == 0.0
    assert 0.0 <= test.noise_floor <= 1e-4


def test_one_changed_weight_under_a_forced_fingerprint_fails(
    copy: Path, store: Store, write_sequences: pl.DataFrame
) -> None:
    config, checkpoint = ModelConfig(checkpoint=str(copy)), Checkpoint(copy)
    key = scorer_key(store, config, checkpoint)
    always = ScoringConfig(null_test="always")
    assert score_sequences("m", key, config, checkpoint, write_sequences, always).null_test.passed
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    honest = scorer_key(store, config, checkpoint)
    assert honest.model.model_id != key.model.model_id, "the fingerprint itself tells"
    # The identity lies: the old key over the new weights.
    lied = score_sequences("m", key, config, checkpoint, write_sequences, always)
    assert lied.n_scored == 0
    assert lied.null_test.repeat == 0.0
    assert lied.null_test.ledger > 1e-3
    assert not lied.null_test.passed


def test_half_precision_is_allowed_its_own_noise(
    copy: Path, store: Store, write_sequences: pl.DataFrame
) -> None:
    config, checkpoint = ModelConfig(checkpoint=str(copy), dtype="bfloat16"), Checkpoint(copy)
    key = scorer_key(store, config, checkpoint)
    test = score_sequences("m", key, config, checkpoint, write_sequences, ScoringConfig()).null_test
    assert test.passed
    assert test.tolerance == 1.0
    assert test.repeat == 0.0
    # On a CPU it may have none to show; an engine whose numbers depend on the batch has.
    other = replace(key, ledger=store.root / "noisy")
    for tolerance, passes in ((None, True), (1e-2, False)):
        settings = ScoringConfig(null_test="always", null_test_tolerance=tolerance)
        control = score_sequences(
            "m", other, config, checkpoint, write_sequences, settings, lambda *_: NoisyEngine()
        ).null_test
        assert 1e-2 < control.noise_floor < 1.0
        assert control.passed is passes


def test_the_last_verdict_stands_while_nothing_is_scored(
    copy: Path, store: Store, write_sequences: pl.DataFrame
) -> None:
    config, checkpoint = ModelConfig(checkpoint=str(copy)), Checkpoint(copy)
    key = scorer_key(store, config, checkpoint)
    first = score_sequences("m", key, config, checkpoint, write_sequences, ScoringConfig())
    again = score_sequences("m", key, config, checkpoint, write_sequences, ScoringConfig())
    assert not again.model_loaded
    assert again.null_test == first.null_test
