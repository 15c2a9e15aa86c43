"""Killed anywhere, a pass goes on where it was: the tables are those of an undisturbed one."""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from fake_engine import FakeEngine
from forks import KILLED, begin, ended
from support import measured

from pipeline import failpoints
from pipeline.errors import StoreError
from pipeline.failpoints import POINTS
from pipeline.scoring.ledger import collect, compact, read_logprobs, scorers, verify_ledger
from pipeline.scoring.ledger.manifests import present
from pipeline.store import Store, publish, read
from schemas import LogProb, Scorer
from scoring.ledger.desk import everything, fake_key, made_sequences, score

SEQUENCES, COMMIT_ROWS = made_sequences(8), 4
"""Sixteen, in four commits."""


def work(root: Path) -> None:
    """Everything that writes: a pass, the repair of a damaged commit, tables, upkeep."""
    root.mkdir(exist_ok=True)
    key, store = fake_key(root), Store(root, "plan")
    score(key, SEQUENCES, commit_rows=COMMIT_ROWS)
    publish(store, "scorers", scorers(store.ledger), Scorer)
    if not (root / "damaged").exists():
        (root / "damaged").touch()
        path = present(key.directory)[0].path
        path.write_bytes(path.read_bytes()[:-9])
    score(key, SEQUENCES, commit_rows=COMMIT_ROWS)
    compact(key.directory)
    collect(key.ledger, remove=True)
    publish(store, "logprobs", read_logprobs(key), LogProb)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    work(root)
    return root


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often an undisturbed run comes to each point."""
    failpoints.arm(",".join(f"{point}:count" for point in POINTS))
    try:
        work(tmp_path_factory.mktemp("counted"))
        return failpoints.passed()
    finally:
        failpoints.arm("")


def require_resumed(root: Path, undisturbed: Path, said: str) -> None:
    """What a crash left is sound, and going on ends where an undisturbed run does."""
    key, other = fake_key(root), fake_key(undisturbed)
    expected = everything(other)
    root.mkdir(exist_ok=True)
    left = everything(key)
    ids = left["sequence_id"].to_list()
    assert left.equals(expected.filter(pl.col("sequence_id").is_in(ids))), said
    engine = FakeEngine()
    score(key, SEQUENCES, engine, commit_rows=COMMIT_ROWS)
    # Those of the null test are scored past the ledger.
    assert set(engine.scored) - set(ids) == set(expected["sequence_id"]) - set(ids), said
    work(root)
    assert everything(key).equals(expected), said
    mine, theirs = Store(root, "plan"), Store(undisturbed, "plan")
    assert read(mine, "logprobs").equals(read(theirs, "logprobs")), said
    for table in ("logprobs",):
        one, two = (s.current(table).resolve().read_bytes() for s in (mine, theirs))
        assert one == two, f"{said}: '{table}' is not equal to the byte"
    collect(key.ledger, remove=True)
    assert not list(key.ledger.rglob("*.tmp")), said
    assert everything(key).equals(expected), said
    assert verify_ledger(key.ledger) == [], said


def test_every_point_is_come_to(counted: dict[str, int]) -> None:
    # Training's own points are come to in tests/training.
    trainings = ("checkpoint.", "policy.")
    assert set(counted) == {point for point in POINTS if not point.startswith(trainings)}
    measured(f"{sum(counted.values())} steps at {len(POINTS)} points where a crash is tried")


def crash(tmp_path: Path, undisturbed: Path, faults: list[tuple[str, int]]) -> None:
    """Kill a run at each of some points, three at a time, and resume each."""
    for start in range(0, len(faults), 3):
        some = faults[start : start + 3]
        roots = [tmp_path / f"{point}-{n}" for point, n in some]
        processes = [
            begin(work, root, fail=f"{point}:kill@{n}")
            for root, (point, n) in zip(roots, some, strict=True)
        ]
        for root, process, fault in zip(roots, processes, some, strict=True):
            assert ended(process) == KILLED, f"{fault} was not come to"
            require_resumed(root, undisturbed, f"killed at {fault}")
            shutil.rmtree(root)


def test_killed_at_every_point(tmp_path: Path, undisturbed: Path, counted: dict[str, int]) -> None:
    generator = random.Random(0)
    faults = [(point, generator.randint(1, n)) for point, n in counted.items()]
    crash(tmp_path, undisturbed, faults)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_every_step(tmp_path: Path, undisturbed: Path, counted: dict[str, int]) -> None:
    crash(tmp_path, undisturbed, [(p, i) for p, n in counted.items() for i in range(1, n + 1)])


def killed_at_random(tmp_path: Path, undisturbed: Path, n: int, seed: int) -> None:
    generator = random.Random(seed)
    whole = 0.0
    for i in range(2):  # the first one waits for the server of processes
        started = time.monotonic()
        assert ended(begin(work, tmp_path / f"whole{i}")) == 0
        whole = time.monotonic() - started
    disturbed = 0
    for i in range(n):
        root = tmp_path / str(i)
        process = begin(work, root)
        time.sleep(generator.uniform(0, 0.9) * whole)
        process.kill()
        disturbed += ended(process) == KILLED
        require_resumed(root, undisturbed, f"seed {seed}, crash {i}")
        shutil.rmtree(root)
    assert disturbed > n // 3, "most of them were too late to disturb anything"


def test_killed_at_random_moments(tmp_path: Path, undisturbed: Path) -> None:
    killed_at_random(tmp_path, undisturbed, 6, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_a_hundred_random_moments(tmp_path: Path, undisturbed: Path) -> None:
    killed_at_random(tmp_path, undisturbed, 100, seed=2)


def only_score(root: Path) -> None:
    score(fake_key(root), SEQUENCES, commit_rows=COMMIT_ROWS)


def test_no_more_is_lost_than_was_in_flight(tmp_path: Path) -> None:
    """Killed just before its n-th manifest, a pass has the commits before it."""
    for n in range(1, 5):
        root = tmp_path / str(n)
        assert ended(begin(only_score, root, fail=f"ledger.parts:kill@{n}")) == KILLED
        assert read_logprobs(fake_key(root)).height == COMMIT_ROWS * (n - 1)
        engine = FakeEngine()
        result = score(fake_key(root), SEQUENCES, engine, commit_rows=COMMIT_ROWS)
        assert result.n_reused == COMMIT_ROWS * (n - 1)
        assert result.n_scored == 16 - COMMIT_ROWS * (n - 1)


@pytest.fixture
def fail() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.mark.parametrize("error", ["enospc", "eio"])
def test_a_disk_that_fails_at_any_point_is_named_and_the_pass_goes_on(
    error: str, tmp_path: Path, undisturbed: Path, counted: dict[str, int], fail: None
) -> None:
    said = {"enospc": "No space left on device", "eio": "Input/output error"}[error]
    # The others are between calls to the disk; a reader who cannot set aside does without.
    points = [p for p in POINTS if p.startswith(("store.", "pointer."))]
    for point in (*points, "collect.manifest", "collect.file"):
        root = tmp_path / point
        failpoints.arm(f"{point}:{error}@{1 + counted[point] // 2}")
        with pytest.raises(StoreError, match=said) as caught:
            work(root)
        assert failpoints.passed()[point] > 0
        failpoints.arm("")
        assert str(root) in str(caught.value)
        require_resumed(root, undisturbed, f"{error} at {point}")


def test_the_variable_is_read_by_a_process_that_starts(tmp_path: Path) -> None:
    script = "from pipeline.failpoints import reach; reach('store.linked'); print('alive')"
    for said, status in (("store.linked:kill@2", 0), ("store.linked:kill", KILLED)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"LOGRATIO_FAIL": said, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=False,
        )
        assert done.returncode == status
    with pytest.raises(ValueError, match="known point"):
        failpoints.arm("store.nowhere:kill@1")


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_pass_goes_on_when_there_is_room(
    tmp_path: Path, undisturbed: Path
) -> None:
    """On a real one, at twenty sizes; needs root, hence slow."""
    expected, stopped = everything(fake_key(undisturbed)), 0
    for n_kib in range(4, 84, 4):
        disk = tmp_path / f"{n_kib}k"
        disk.mkdir()
        small = ["-t", "tmpfs", "-o", f"size={n_kib}k", "tmpfs", str(disk)]
        subprocess.run(["mount", *small], check=True)
        try:
            key = fake_key(disk)
            try:
                score(key, SEQUENCES, commit_rows=COMMIT_ROWS)
            except StoreError as error:
                stopped += 1
                said = str(error)
            else:
                said = f"No space left on device, {disk}"
            assert "No space left on device" in said
            assert str(disk) in said
            left = everything(key)
            ids = left["sequence_id"].to_list()
            assert left.equals(expected.filter(pl.col("sequence_id").is_in(ids)))
            assert verify_ledger(key.ledger) == []
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
            result = score(key, SEQUENCES, commit_rows=COMMIT_ROWS)
            assert result.n_reused == len(ids)
            assert everything(key).equals(expected)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    measured(f"{stopped} of 20 passes were stopped by a full disk")
    assert 5 < stopped < 20


def overlapping(root: Path, first: int) -> None:
    (root / f"ready{first}").touch()
    while len(list(root.glob("ready*"))) < 8:
        time.sleep(0.001)
    score(fake_key(root), SEQUENCES.slice(first, 9), commit_rows=1)


def test_eight_writers_on_overlapping_work_lose_and_double_nothing(
    tmp_path: Path, undisturbed: Path
) -> None:
    processes = [begin(overlapping, tmp_path, first) for first in range(8)]
    assert [ended(process) for process in processes] == [0] * 8
    key = fake_key(tmp_path)
    expected = everything(fake_key(undisturbed))
    assert everything(key).equals(expected)
    assert verify_ledger(key.ledger) == []
    compact(key.directory)
    collect(key.ledger, remove=True)
    assert everything(key).equals(expected)
    (commit,) = present(key.directory)
    assert commit.parts["logprobs"].rows == commit.parts["token_logprobs"].rows == 16
