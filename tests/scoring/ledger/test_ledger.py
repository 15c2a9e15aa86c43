"""The ledger: first committed wins, damage is found, a kill loses only what was in flight."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fake_engine import FakeEngine

from pipeline.errors import ScoringError, StoreError
from pipeline.scoring.ledger import append, read_logprobs, read_token_logprobs, scorers
from scoring.ledger.desk import PROVENANCE, A, B, fake_key, rows, score


def test_only_what_is_missing_is_scored(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    key, engine = fake_key(tmp_path), FakeEngine()
    first = score(key, write_sequences.head(8), engine)
    assert (first.n_scored, first.n_reused, first.model_loaded) == (8, 0, True)
    more = score(key, write_sequences, engine)
    assert (more.n_scored, more.n_reused) == (4, 8)
    engine.scored.clear()
    again = score(key, write_sequences, engine)
    assert (again.n_scored, again.n_reused, again.model_loaded) == (0, 12, False)
    assert engine.scored == []


def test_another_model_scores_everything(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    score(fake_key(tmp_path), write_sequences)
    assert score(fake_key(tmp_path, "other"), write_sequences).n_scored == 12


def test_the_first_committed_value_wins(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    append(key, *rows(key, {A: -1.0}), PROVENANCE)
    append(key, *rows(key, {A: -2.0, B: -3.0}), PROVENANCE)
    assert dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows()) == {
        A: -1.0,
        B: -3.0,
    }


def test_scorers_are_spelled_out_once(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    for model in ("one", "two"):
        score(fake_key(tmp_path, model), write_sequences, commit_rows=2)
    table = scorers(tmp_path / "ledger")
    assert sorted(table["weights"]) == ["one", "two"]
    assert table["engine"].unique().to_list() == ["fake"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_committed(tmp_path: Path, value: float) -> None:
    key = fake_key(tmp_path)
    with pytest.raises(StoreError, match="NaN or infinite"):
        append(key, *rows(key, {A: value}), PROVENANCE)
    assert read_logprobs(key).is_empty()


def test_an_engine_that_returns_nan_stops_the_pass_and_keeps_what_was_committed(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    class Failing(FakeEngine):
        def score(self, groups: Any, batch_tokens: int) -> list[list[np.ndarray]]:
            result = super().score(groups, batch_tokens)
            if len(self.scored) > 6:
                result[0][0][0] = np.nan
            return result

    key = fake_key(tmp_path)
    with pytest.raises(ScoringError, match="NaN"):
        score(key, write_sequences, Failing(), commit_rows=2)
    assert read_logprobs(key).height == 6


def test_a_part_without_a_manifest_does_not_exist(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=4)
    newest = max((key.directory / "manifest").iterdir())
    newest.unlink()
    assert read_logprobs(key).height == 8
    assert score(key, write_sequences).n_scored == 4


def test_another_scorers_part_is_not_believed(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    one, two = fake_key(tmp_path, "one"), fake_key(tmp_path, "two")
    score(one, write_sequences)
    two.directory.parent.mkdir()
    two.directory.symlink_to(one.directory)
    assert read_logprobs(two).is_empty()


def test_a_sealed_manifest_cannot_be_edited(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences)
    manifest = next((key.directory / "manifest").iterdir())
    sealed = json.loads(manifest.read_text())
    sealed["body"] = sealed["body"].replace('"rows": 12', '"rows": 13')
    manifest.write_text(json.dumps(sealed))
    assert read_logprobs(key).is_empty()
    assert len(list((key.directory / "set_aside").iterdir())) == 1


def test_planning_reads_no_token(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    """They are a hundred times as large; that one is damaged shows when it is read, or verified."""
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=4)
    for part in (key.directory / "token_logprobs").iterdir():
        part.write_bytes(b"damaged")
    again = score(key, write_sequences)
    assert (again.n_scored, again.model_loaded) == (0, False)
    assert not (key.directory / "set_aside").exists()
    assert read_token_logprobs(key).is_empty()
    assert score(key, write_sequences).n_scored == 12
