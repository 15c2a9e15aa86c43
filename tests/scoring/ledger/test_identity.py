"""What is scored again and what is not: identity, and nothing but identity, decides."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fake_engine import FakeEngine
from support import prepared, tokenized

from pipeline.models import Checkpoint
from pipeline.scoring.run import scorer_key
from pipeline.stages import score as score_stage
from pipeline.store import Store
from pipeline.tokenization import sequence_id
from schemas import identity_fields
from scoring.ledger.desk import CONFIG, everything, fake_key, score

FIELDS = [(of, field) for of in ("model", "numerics") for field in identity_fields(of)]


@pytest.mark.parametrize(("of", "field"), FIELDS)
def test_every_identity_column_changed_alone_scores_everything(
    of: str, field: str, tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key, engine = fake_key(tmp_path), FakeEngine()
    part: Any = getattr(key, of)
    value = asdict(part)[field]
    others = {"batch_invariant": not value, "adapter_mode": "merged"}
    changed = others.get(field, value + (1 if isinstance(value, int) else "x"))
    other = replace(key, **{of: replace(part, **{field: changed})})
    runs = [score(k, write_sequences, engine) for k in (key, key, other, other, key)]
    assert [run.n_scored for run in runs] == [12, 0, 12, 0, 0]


def test_one_changed_row_scores_one_row(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    key, engine = fake_key(tmp_path), FakeEngine()
    score(key, write_sequences, engine)
    before = everything(key)
    row = write_sequences.row(5, named=True)
    prompt = np.asarray(row["prompt_ids"], np.int32)
    ids = np.asarray(row["completion_ids"], np.int32)
    ids[-1] += 1
    changed = {
        **row,
        "completion_ids": ids.tolist(),
        "sequence_id": sequence_id(prompt, ids, [(0, len(ids))]),
    }
    rest = write_sequences.filter(pl.col("sequence_id") != row["sequence_id"])
    edited = pl.concat([rest, pl.DataFrame([changed], schema=rest.schema)])
    engine.scored.clear()
    result = score(key, edited, engine)
    assert (result.n_scored, result.n_reused) == (1, 11)
    assert engine.scored[0] == changed["sequence_id"]
    after = everything(key)
    assert after.height == 13
    assert after.filter(pl.col("sequence_id") != changed["sequence_id"]).equals(before)


def objective(**values: Any) -> dict[str, Any]:
    return {"objectives": {"dpo": {"loss": "dpo", "reference": "base", "start": "base", **values}}}


CHANGES: dict[str, dict[str, Any]] = {
    "loss": objective(loss="ipo", beta=0.1),
    "beta": objective(beta=0.7),
    "learning rate": {"training": {"learning_rate": 1e-6}},
    "seed": {"training": {"seed": 5}},
    "report": {"report": {"beta": 0.3}},
    "commits": {"scoring": {"commit_rows": 1, "batch_tokens": 0}},
    "name": {"name": "another"},
}


def test_what_is_no_identity_scores_nothing(
    write_plan: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    plan, store = prepared(write_plan())
    for what, sections in CHANGES.items():
        plan, store = tokenized(write_plan(**sections))
        result = score_stage(plan, store, "base")
        assert (result.n_scored, result.model_loaded) == (0, False), what
        assert result.n_reused == 24, what
    # Another place for the tables, and for the model.
    shutil.copytree(store.root, tmp_path / "elsewhere")
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    plan, moved = tokenized(
        write_plan(store=str(tmp_path / "elsewhere"), models={"base": {"checkpoint": str(copy)}})
    )
    assert moved.root != store.root
    result = score_stage(plan, moved, "base")
    assert (result.n_scored, result.model_loaded) == (0, False)
    # The control: a dtype is identity.
    plan, store = tokenized(
        write_plan(models={"base": {"checkpoint": str(tiny_model), "dtype": "bfloat16"}})
    )
    assert score_stage(plan, store, "base").n_scored == 24


def test_a_byte_flipped_in_the_weights_with_the_old_mtime_is_a_miss(
    tiny_model: Path, store: Store, tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    checkpoint, engine = Checkpoint(copy), FakeEngine()
    assert score(scorer_key(store, CONFIG, checkpoint), write_sequences, engine).n_scored == 12
    assert score(scorer_key(store, CONFIG, checkpoint), write_sequences, engine).n_scored == 0
    weights = copy / "model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-7, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert score(scorer_key(store, CONFIG, checkpoint), write_sequences, engine).n_scored == 12
