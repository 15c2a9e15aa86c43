"""`logratio ledger`: what it prints, and the status it ends with."""

from pathlib import Path

import polars as pl
import pytest

from assets.cli import main
from pipeline.scoring.ledger.manifests import in_force, present
from scoring.ledger.desk import everything, fake_key, score


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["ledger", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_from_inventory_to_collection(
    tmp_path: Path, write_sequences: pl.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=2)
    score(fake_key(tmp_path, "other"), write_sequences.head(3))
    before = everything(key)
    status, text = said(capsys, "inventory", tmp_path)
    assert status == 0
    tokens = write_sequences["n_scored"].sum()
    assert f"12 sequences, {tokens:,} scored tokens" in text
    assert "in 6 commits" in text
    assert "2 models in 2 ways of scoring, 15 log-probs of sequences" in text
    assert said(capsys, "verify", tmp_path) == (
        0,
        "2 ways of scoring, every byte is as it was committed\n",
    )
    assert "6 commits are now 1" in said(capsys, "compact", tmp_path)[1]
    assert "18 files would be removed with --remove" in said(capsys, "gc", tmp_path)[1]
    assert "18 files removed" in said(capsys, "gc", tmp_path, "--remove")[1]
    assert "0 files would be" in said(capsys, "gc", tmp_path)[1]
    assert everything(key).equals(before)
    (commit,) = in_force(present(key.directory))
    part = key.directory / "logprobs" / commit.parts["logprobs"].file
    part.write_bytes(b"junk")
    status, text = said(capsys, "verify", tmp_path)
    assert status == 1
    assert f"{part}: damaged: 4 bytes instead of" in text
    assert "1 faults in the ledger of 2 ways of scoring" in text


def test_a_store_without_a_ledger_is_that_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = said(capsys, "inventory", tmp_path)
    assert status == 2
    assert f"{tmp_path / 'ledger'}: there is no ledger" in text
