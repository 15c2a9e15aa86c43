"""The ledger: first committed wins, damage is found, a kill loses only what was in flight."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from support import FAKE_NUMERICS, FakeEngine

from pipeline.errors import ScoringError, StoreError
from pipeline.models import Checkpoint, ModelIdentity
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.ledger import (
    ScorerKey,
    append,
    read_logprobs,
    read_token_logprobs,
    scorers,
)
from pipeline.scoring.run import ScoringResult, score_sequences
from schemas import LogProb, TokenLogProb, polars_schema

CONFIG = ModelConfig(checkpoint="none")
CHECKPOINT = Checkpoint(Path("/none"))


def fake_key(root: Path, model: str = "model") -> ScorerKey:
    return ScorerKey(root / "ledger", ModelIdentity(model, "{}", ""), FAKE_NUMERICS)


def score(
    key: ScorerKey, sequences: pl.DataFrame, engine: FakeEngine | None = None, **settings: Any
) -> ScoringResult:
    used = engine or FakeEngine()
    return score_sequences(
        "m", key, CONFIG, CHECKPOINT, sequences, ScoringConfig(**settings), lambda *_: used
    )


def rows(key: ScorerKey, values: dict[str, float]) -> tuple[pl.DataFrame, pl.DataFrame]:
    scorer = {"model_id": key.model.model_id, "numerics_id": FAKE_NUMERICS.numerics_id}
    sums = [{**scorer, "sequence_id": i, "logprob": v, "n_tokens": 1} for i, v in values.items()]
    tokens = [{**scorer, "sequence_id": i, "logprobs": [v]} for i, v in values.items()]
    return (
        pl.DataFrame(sums, schema=polars_schema(LogProb)),
        pl.DataFrame(tokens, schema=polars_schema(TokenLogProb)),
    )


PROVENANCE = {"checkpoint": "c", "versions": "{}", "host": "h", "created_at": "now"}
A, B = "a" * 32, "b" * 32


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


def damage(path: Path, generator: random.Random) -> str:
    """Corrupt a file in one of six ways; returns which."""
    data = bytearray(path.read_bytes())
    kind = generator.choice(["flip", "truncate", "append", "zero", "empty", "swap"])
    if kind == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif kind == "truncate":
        del data[generator.randrange(len(data)) :]
    elif kind == "append":
        data += b"\0junk"
    elif kind == "zero":
        at = generator.randrange(len(data))
        data[at : at + 64] = b"\xff" * len(data[at : at + 64])
    elif kind == "empty":
        data = bytearray()
    elif kind == "swap":
        other = next(p for p in sorted(path.parent.iterdir()) if p != path)
        data = bytearray(other.read_bytes())
    path.write_bytes(data)
    return kind


def committed_files(key: ScorerKey) -> list[Path]:
    """Every manifest and every part a manifest names (others are leftovers nobody reads)."""
    found = []
    for manifest in sorted((key.directory / "manifest").iterdir()):
        parts = json.loads(json.loads(manifest.read_text())["body"])["parts"]
        found += [manifest, *[key.directory / name / part["file"] for name, part in parts.items()]]
    return found


def test_every_corruption_is_found_and_scored_again(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=4)
    good = (read_logprobs(key), read_token_logprobs(key))
    seen = set()
    for seed in range(60):
        generator = random.Random(seed)
        path = generator.choice(committed_files(key))
        seen.add((path.parent.name, damage(path, generator)))
        held = (read_logprobs(key).height, read_token_logprobs(key).height)
        assert min(held) < 12, f"seed {seed}: not noticed"
        score(key, write_sequences, commit_rows=4)
        for now, before in zip((read_logprobs(key), read_token_logprobs(key)), good, strict=True):
            assert now.equals(before), f"seed {seed}: a wrong number was read"
    assert len(seen) >= 12


def test_another_scorers_part_is_not_believed(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    one, two = fake_key(tmp_path, "one"), fake_key(tmp_path, "two")
    score(one, write_sequences)
    two.directory.parent.mkdir()
    two.directory.symlink_to(one.directory)
    assert read_logprobs(two).is_empty()


WRITER = """
import sys, time
from pathlib import Path
import polars as pl
from test_ledger import fake_key, score

root, table, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sequences = pl.read_parquet(table).slice(first, 6)
(root / f"ready{first}").touch()
while len(list(root.glob("ready*"))) < 4:
    time.sleep(0.001)
score(fake_key(root), sequences, commit_rows=1)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script that imports this module and `support`, in a process of its own."""
    folder = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_writers_on_overlapping_work_lose_and_double_nothing(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    table = tmp_path / "sequences.parquet"
    write_sequences.write_parquet(table)
    root = tmp_path / "together"
    root.mkdir()
    processes = [start(WRITER, root, table, first) for first in (0, 2, 4, 6)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    alone = fake_key(tmp_path / "alone")
    score(alone, write_sequences)
    assert read_logprobs(fake_key(root)).equals(read_logprobs(alone))


KILLED = """
import sys, time
from pathlib import Path
import polars as pl
from support import FAKE_NUMERICS, FakeEngine
from test_ledger import fake_key, score

class Slow(FakeEngine):
    def score(self, groups, batch_tokens):
        time.sleep(0.05)
        print("scored", flush=True)
        return super().score(groups, batch_tokens)

score(fake_key(Path(sys.argv[1])), pl.read_parquet(sys.argv[2]), Slow(), commit_rows=2)
"""


def test_killed_in_the_middle_the_numbers_are_the_same(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    alone = fake_key(tmp_path / "undisturbed")
    score(alone, write_sequences)
    table = tmp_path / "sequences.parquet"
    write_sequences.write_parquet(table)
    root = tmp_path / "killed"
    process = start(KILLED, root, table)
    assert process.stdout is not None
    for _ in range(4):  # groups of two sequences: the fourth is being scored now
        process.stdout.readline()
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    committed = read_logprobs(fake_key(root)).height
    assert 0 < committed < 12
    assert committed >= 4, "at most what was in flight is lost"
    resumed = score(fake_key(root), write_sequences, commit_rows=2)
    assert resumed.n_reused == committed
    assert resumed.n_scored == 12 - committed
    assert read_logprobs(fake_key(root)).equals(read_logprobs(alone))
    control = score(fake_key(root, "m2"), write_sequences, FakeEngine(salt="other"))
    assert not read_logprobs(control.key)["logprob"].equals(read_logprobs(alone)["logprob"])


def test_a_sealed_manifest_cannot_be_edited(tmp_path: Path, write_sequences: pl.DataFrame) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences)
    manifest = next((key.directory / "manifest").iterdir())
    sealed = json.loads(manifest.read_text())
    sealed["body"] = sealed["body"].replace('"rows": 12', '"rows": 13')
    manifest.write_text(json.dumps(sealed))
    assert read_logprobs(key).is_empty()
    assert len(list((key.directory / "set_aside").iterdir())) == 1
