"""The null test passes on an honest ledger and fails when identity lies."""

import shutil
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store


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
    strict = ScoringConfig(null_test="always", null_test_tolerance=1e-9)
    control = score_sequences("m", key, config, checkpoint, write_sequences, strict).null_test
    assert control.noise_floor > 1e-9
    assert not control.passed


def test_the_last_verdict_stands_while_nothing_is_scored(
    copy: Path, store: Store, write_sequences: pl.DataFrame
) -> None:
    config, checkpoint = ModelConfig(checkpoint=str(copy)), Checkpoint(copy)
    key = scorer_key(store, config, checkpoint)
    first = score_sequences("m", key, config, checkpoint, write_sequences, ScoringConfig())
    again = score_sequences("m", key, config, checkpoint, write_sequences, ScoringConfig())
    assert not again.model_loaded
    assert again.null_test == first.null_test
