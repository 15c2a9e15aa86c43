"""Ledgers that earlier versions have written: read, or scored anew, and never wrong (F24).

`published/<version>` is what that version left of `made_sequences(3, seed=11)` in two commits.
"""

import shutil
from pathlib import Path

import polars as pl
import pytest

from pipeline.scoring.ledger import collect, compact, verify_ledger
from scoring.ledger.desk import everything, fake_key, made_sequences, score

PUBLISHED = sorted((Path(__file__).parent / "published").iterdir())


@pytest.mark.parametrize("version", PUBLISHED, ids=lambda path: path.name)
def test_it_is_read_verified_added_to_and_tidied_up(version: Path, tmp_path: Path) -> None:
    shutil.copytree(version, tmp_path / "store")
    key = fake_key(tmp_path / "store")
    old, more = made_sequences(3, seed=11), made_sequences(2, seed=12)
    assert verify_ledger(key.ledger) == []
    assert score(key, old).n_reused == 6
    before = everything(key)
    fresh = fake_key(tmp_path / "fresh")
    score(fresh, pl.concat([old, more]))
    assert before.equals(everything(fresh).join(old, on="sequence_id", how="semi"))
    assert score(key, more).n_scored == 4
    compact(key.directory)
    collect(key.ledger, remove=True)
    assert everything(key).equals(everything(fresh))
    assert verify_ledger(key.ledger) == []
