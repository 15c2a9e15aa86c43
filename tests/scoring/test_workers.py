"""The local executor: one process or several, and the ledger is the same; nothing is lost."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from fake_engine import FAKE_NUMERICS
from support import PROJECT, build_tiny_model

from pipeline.errors import ModelError, ScoringError
from pipeline.models import Checkpoint, ModelIdentity
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.engines.base import EngineDied, Open, groups_of
from pipeline.scoring.engines.torch_engine import torch_numerics
from pipeline.scoring.ledger import (
    ScorerKey,
    read_extras,
    read_logprobs,
    read_token_logprobs,
    read_unscored,
)
from pipeline.scoring.run import ScoringResult, score_sequences
from pipeline.scoring.workers import Opening, _cpu_places, _gpu_places, workers
from scoring.openers import (
    die,
    kill_worker_once,
    notes,
    open_dying,
    open_fake,
    open_faulty,
    open_never,
    open_noting,
    open_torch,
    open_with_a_process,
    processes,
    square,
    whereabouts,
)

ON_GPUS = replace(FAKE_NUMERICS, device_class="cuda-sm90")


def key_in(root: Path, model: str = "model") -> ScorerKey:
    return ScorerKey(root, ModelIdentity(model, "{}", ""), FAKE_NUMERICS)


def score(
    key: ScorerKey,
    sequences: pl.DataFrame,
    directory: Path,
    open_: Open = open_noting,
    fate: str = "none",
    **settings: Any,
) -> ScoringResult:
    """A pass in small parts, by default in two processes."""
    said: dict[str, Any] = {"workers": 2, "commit_rows": 2, **settings}
    config, checkpoint = ModelConfig(checkpoint=fate), Checkpoint(directory)
    return score_sequences("m", key, config, checkpoint, sequences, ScoringConfig(**said), open_)


def held(key: ScorerKey) -> pl.DataFrame:
    """All of the ledger, token by token."""
    return read_logprobs(key).join(read_token_logprobs(key), on="sequence_id").sort("sequence_id")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Where engines leave notes."""
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


@pytest.fixture(scope="session")
def alone(write_sequences: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What one worker in this process leaves in the ledger."""
    root = tmp_path_factory.mktemp("alone")
    key = key_in(root)
    score(key, write_sequences, root, open_fake, workers=1)
    return held(key)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A dead child that nobody has asked after is still listed.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(what: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


# The same numbers, however many


@dataclass(frozen=True)
class Pass:
    """A pass in two processes: its notes, its ledger, its result."""

    desk: Path
    key: ScorerKey
    result: ScoringResult


@pytest.fixture(scope="module")
def by_two(write_sequences: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Pass:
    root, desk = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("notes")
    key = key_in(root)
    return Pass(desk, key, score(key, write_sequences, desk, null_test_rows=4))


def test_two_processes_give_a_bit_equal_ledger(
    by_two: Pass, alone: pl.DataFrame, write_sequences: pl.DataFrame
) -> None:
    assert held(by_two.key).equals(alone)
    assert by_two.result.n_scored == write_sequences.height
    assert by_two.result.n_tokens == sum(
        len(row["prompt_ids"]) + len(row["completion_ids"])
        for row in write_sequences.iter_rows(named=True)
    )
    assert by_two.result.null_test.passed
    assert os.getpid() not in processes(by_two.desk, "opened")


def test_the_null_test_runs_in_the_same_workers_and_a_model_is_loaded_once_in_each(
    by_two: Pass,
) -> None:
    opened = processes(by_two.desk, "opened")
    assert 1 <= len(opened) == len(set(opened)) <= 2
    scored = notes(by_two.desk, "scored")
    assert {int(words[0]) for words in scored} <= set(opened)
    # Six parts of two sequences, then the sample three times over.
    assert [len(words) - 1 for words in scored] == [2] * 6 + [4] * 3
    assert len({words[0] for words in scored[6:]}) == 1


def test_every_worker_closes_its_engine_when_the_pass_is_over(by_two: Pass) -> None:
    opened = processes(by_two.desk, "opened")
    assert sorted(processes(by_two.desk, "closed")) == sorted(opened)
    assert not any(is_there(pid) for pid in opened)


def test_one_worker_on_a_cpu_is_this_process(
    alone: pl.DataFrame, write_sequences: pl.DataFrame, desk: Path, tmp_path: Path
) -> None:
    key = key_in(tmp_path)
    score(key, write_sequences, desk, workers=None)
    assert processes(desk, "opened") == [os.getpid()] == processes(desk, "closed")
    assert held(key).equals(alone)


def test_nothing_is_opened_while_there_is_nothing_to_do(desk: Path) -> None:
    opening = Opening(open_noting, ModelConfig(checkpoint="x"), Checkpoint(desk), 10)
    for n_workers in (1, 2):
        with workers(opening, FAKE_NUMERICS, n_workers) as run:
            assert list(run(square, [], None)) == []
    assert not processes(desk, "opened")


def test_two_processes_with_the_torch_engine_agree_with_one_within_the_noise_floor(
    tiny_model: Path, write_sequences: pl.DataFrame, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_model)
    config = ModelConfig(checkpoint=str(tiny_model), engine="torch")
    numerics = torch_numerics(config, checkpoint)
    found = []
    for name, n_workers in (("one", 1), ("two", 2)):
        key = ScorerKey(tmp_path / name, ModelIdentity("m", "{}", ""), numerics)
        settings = ScoringConfig(workers=n_workers, commit_rows=2)
        result = score_sequences(
            "m", key, config, checkpoint, write_sequences, settings, open_torch, ["entropy"]
        )
        assert result.null_test.passed
        found.append(
            read_logprobs(key).join(read_extras(key), on="sequence_id").sort("sequence_id")
        )
    one, two = found
    assert one.height == write_sequences.height
    assert float((one["total"] - two["total"]).abs().max()) <= 1e-4  # type: ignore[arg-type]
    assert one["sequence_id"].equals(two["sequence_id"])
    assert float((one["logprob"] - two["logprob"]).abs().max()) <= 1e-4  # type: ignore[arg-type]
    # The control: the same through another model.
    other = Checkpoint(build_tiny_model(tmp_path / "other", seed=5))
    key = ScorerKey(tmp_path / "three", ModelIdentity("o", "{}", ""), numerics)
    score_sequences("m", key, config, other, write_sequences, ScoringConfig(workers=1), open_torch)
    difference = (one["logprob"] - read_logprobs(key)["logprob"]).abs()
    assert float(difference.min()) > 1e-4, "the control must fail"  # type: ignore[arg-type]
    # A worker's share of the cores was set before torch was loaded there.
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    here = str(os.getpid())
    told = [words for words in notes(tiny_model, "torch") if words[0] != here]
    assert told
    for _, had_torch, threads in told:
        assert had_torch == "False"
        assert int(threads) == share


# Processes that die


def test_a_killed_worker_loses_nothing(
    alone: pl.DataFrame,
    write_sequences: pl.DataFrame,
    desk: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = key_in(tmp_path)
    victim = shortest(write_sequences)
    with caplog.at_level(logging.WARNING):
        result = score(key, write_sequences, desk, open_faulty, f"killed once:{victim}")
    assert "starting workers anew" in caplog.text
    (killed,) = processes(desk, "killed")
    assert held(key).equals(alone)
    # The other one was ended with it, and still gave its model's memory back.
    assert set(processes(desk, "closed")) == set(processes(desk, "opened")) - {killed}
    assert result.n_scored == write_sequences.height
    assert result.null_test.passed


def test_the_engine_s_own_process_of_a_killed_worker_does_not_stay(desk: Path) -> None:
    """As vLLM's engine core would, with all of a GPU's memory, so that no other one could load."""
    config, checkpoint = ModelConfig(checkpoint="x"), Checkpoint(desk)
    opening = Opening(open_with_a_process, config, checkpoint, 10)
    with workers(opening, FAKE_NUMERICS, 2) as run:
        (worker,) = run(kill_worker_once, [desk], None)
        killed, new = notes(desk, "core")
        assert not is_there(int(killed[1])), "gone before the next one is opened"
        assert is_there(int(new[1]))
        assert int(new[0]) == worker
    assert not is_there(int(new[1]))


def test_a_worker_killed_while_it_waits_is_replaced(desk: Path) -> None:
    opening = Opening(open_noting, ModelConfig(checkpoint="x"), Checkpoint(desk), 10)
    with workers(opening, FAKE_NUMERICS, 2) as run:
        told = dict(run(square, [1, 2, 3], None))
        for pid in told:
            with contextlib.suppress(ProcessLookupError):  # ended with the first one
                os.kill(pid, signal.SIGKILL)
            assert wait_for(lambda pid=pid: not is_there(pid))  # type: ignore[misc]
        time.sleep(0.2)  # the pool has noticed by then, and takes nothing any more
        again = list(run(square, [4, 5], None))
    assert sorted(result for _, result in again) == [16, 25]
    assert not {pid for pid, _ in again} & told.keys()


def test_a_part_that_kills_every_worker_ends_the_pass_and_what_was_committed_stays(
    alone: pl.DataFrame, write_sequences: pl.DataFrame, desk: Path, tmp_path: Path
) -> None:
    key = key_in(tmp_path)
    # Groups come the longest first, so the last to come is of the shortest.
    victim = shortest(write_sequences)
    with pytest.raises(ScoringError, match="workers died 2 times") as raised:
        score(key, write_sequences, desk, open_faulty, f"killed always:{victim}", commit_rows=1)
    assert not isinstance(raised.value, EngineDied)
    assert is_a_part_of(held(key), alone)
    assert held(key).height >= write_sequences.height // 2
    again = score(key, write_sequences, desk)
    assert again.n_reused > 0
    assert held(key).equals(alone)


def test_an_engine_that_died_is_replaced_with_its_process_and_the_other_one_finishes(
    alone: pl.DataFrame, write_sequences: pl.DataFrame, desk: Path, tmp_path: Path
) -> None:
    key = key_in(tmp_path)
    victim = longest_of(write_sequences)
    score(key, write_sequences, desk, open_faulty, f"died once:{victim}")
    (dead,) = processes(desk, "died")
    opened = processes(desk, "opened")
    assert opened.count(dead) == 1, "on a GPU, that process may not have its memory back"
    assert sorted(opened) == sorted(processes(desk, "closed"))
    assert held(key).equals(alone)
    scored = [words[1] for words in notes(desk, "scored") if len(words) == 3]
    assert len(scored) == len(set(scored)), "no part was cut off and done again"


@pytest.mark.parametrize("n_workers", [1, 2])
def test_the_row_that_engines_die_of_is_found_and_all_others_are_scored(
    n_workers: int, alone: pl.DataFrame, write_sequences: pl.DataFrame, desk: Path, tmp_path: Path
) -> None:
    key = key_in(tmp_path)
    victim = write_sequences["sequence_id"][5]
    fate = f"died always:{victim}"
    result = score(key, write_sequences, desk, open_faulty, fate, workers=n_workers)
    # Twice of its part of two rows, then alone.
    assert len(processes(desk, "died")) == 3
    assert (result.n_scored, result.n_unscored) == (11, 1)
    assert held(key).equals(alone.filter(pl.col("sequence_id") != victim))
    (row,) = read_unscored(key).iter_rows(named=True)
    assert (row["sequence_id"], row["rule"]) == (victim, "engine_died")
    assert row["detail"] == f"died on sequences {victim}"
    again = score(key, write_sequences, desk, workers=n_workers)
    assert (again.n_scored, again.n_reused) == (1, 11)
    assert held(key).equals(alone)
    assert read_unscored(key).is_empty()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_engines_that_die_of_everything_end_the_pass(
    n_workers: int, write_sequences: pl.DataFrame, desk: Path, tmp_path: Path
) -> None:
    with pytest.raises(ScoringError, match="engines died 16 times, 16 of them with nothing") as e:
        score(
            key_in(tmp_path), write_sequences, desk, open_dying, workers=n_workers, commit_rows=99
        )
    assert not isinstance(e.value, EngineDied), "there is nobody left who would restart"
    # When the last of them is heard of, the other worker's may have died as well.
    assert 16 <= len(processes(desk, "died")) < 16 + n_workers


def test_work_that_cannot_be_divided_ends_the_pass(desk: Path) -> None:
    opening = Opening(open_noting, ModelConfig(checkpoint="x"), Checkpoint(desk), 10)
    with (
        workers(opening, FAKE_NUMERICS, 1) as run,
        pytest.raises(ScoringError, match="died of it 2 times: always"),
    ):
        list(run(die, [1], None))
    assert len(processes(desk, "opened")) == 2 == len(processes(desk, "closed"))


def test_an_engine_that_dies_once_in_this_process_is_replaced(
    alone: pl.DataFrame, write_sequences: pl.DataFrame, desk: Path, tmp_path: Path
) -> None:
    key = key_in(tmp_path)
    victim = write_sequences["sequence_id"][5]
    score(key, write_sequences, desk, open_faulty, f"died once:{victim}", workers=1)
    assert held(key).equals(alone)
    assert len(processes(desk, "opened")) == 2 == len(processes(desk, "closed"))


def shortest(sequences: pl.DataFrame) -> str:
    """A sequence of the group that is scored last."""
    return groups_of(sequences)[-1].completions[0].sequence_id


def longest_of(sequences: pl.DataFrame) -> str:
    """A sequence of the group that is scored first."""
    return groups_of(sequences)[0].completions[0].sequence_id


def is_a_part_of(some: pl.DataFrame, all_: pl.DataFrame) -> bool:
    ids = some["sequence_id"].to_list()
    return some.equals(all_.filter(pl.col("sequence_id").is_in(ids)))


# Errors


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_model_that_cannot_be_loaded_is_that_error(
    n_workers: int, write_sequences: pl.DataFrame, desk: Path, tmp_path: Path
) -> None:
    key = key_in(tmp_path)
    with pytest.raises(ModelError, match=r"^checkpoint nowhere: cannot be loaded$"):
        score(key, write_sequences, desk, open_never, workers=n_workers)
    assert held(key).is_empty()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_sequence_that_cannot_be_scored_is_that_error_and_what_was_committed_stays(
    n_workers: int,
    alone: pl.DataFrame,
    write_sequences: pl.DataFrame,
    desk: Path,
    tmp_path: Path,
) -> None:
    key = key_in(tmp_path)
    victim = shortest(write_sequences)
    said = f"^sequence {victim}: a log-prob is above 0$"
    with pytest.raises(ScoringError, match=said):
        score(key, write_sequences, desk, open_faulty, f"wrong always:{victim}", workers=n_workers)
    assert processes(desk, "wrong") != []
    assert len(processes(desk, "wrong")) == 1, "it is no fault of the engine's"
    assert held(key).height >= write_sequences.height - 4
    assert is_a_part_of(held(key), alone)
    assert wait_for(
        lambda: not any(is_there(p) for p in processes(desk, "opened") if p != os.getpid())
    )


def interrupted(opening: Opening) -> None:
    with workers(opening, FAKE_NUMERICS, 2) as run:
        for _ in run(square, list(range(50)), None):
            raise KeyboardInterrupt


def test_leaving_early_ends_the_workers(desk: Path) -> None:
    opening = Opening(open_noting, ModelConfig(checkpoint="x"), Checkpoint(desk), 10)
    with pytest.raises(KeyboardInterrupt):
        interrupted(opening)
    assert processes(desk, "opened")
    assert not any(is_there(pid) for pid in processes(desk, "opened"))


def test_workers_do_not_outlive_a_parent_that_was_killed(desk: Path) -> None:
    """Each holds a model, or an engine that works in a process of its own does."""
    script = f"""
from pathlib import Path

from scoring.openers import open_with_a_process, whereabouts
from fake_engine import FAKE_NUMERICS

from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig
from pipeline.scoring.workers import Opening, workers

if __name__ == "__main__":
    here = Checkpoint(Path({str(desk)!r}))
    opening = Opening(open_with_a_process, ModelConfig(checkpoint="x"), here, 10)
    with workers(opening, FAKE_NUMERICS, 2) as run:
        list(run(whereabouts, [0.0] + [60.0] * 3, None))
"""
    path = desk / "parent.py"
    path.write_text(script)
    parent = subprocess.Popen(
        [sys.executable, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=PROJECT,
    )
    theirs: list[int] = []
    try:
        assert wait_for(lambda: len(processes(desk, "opened")) == 2, 60)
        children = processes(desk, "opened")
        theirs = [*children, *(int(core) for _, core in notes(desk, "core"))]
        assert len(theirs) == 4
        assert all(is_there(pid) for pid in theirs)
        parent.kill()
        parent.wait()
        assert wait_for(lambda: not any(is_there(pid) for pid in theirs), 20)
        assert sorted(processes(desk, "closed")) == sorted(children)
    finally:
        parent.kill()
        for pid in theirs:
            if is_there(pid):
                os.kill(pid, signal.SIGKILL)


# Places


@pytest.mark.parametrize(
    ("visible", "size", "n_workers", "groups"),
    [
        ("0,1,2,3", (1, 1), None, ["0", "1", "2", "3"]),
        ("0,1,2,3", (2, 1), None, ["0,1", "2,3"]),
        ("0,1,2,3", (2, 2), None, ["0,1,2,3"]),
        ("4,7", (1, 1), None, ["4", "7"]),
        ("0,1,2", (2, 1), None, ["0,1"]),  # one stays idle
        ("0,1,2,3", (1, 1), 2, ["0", "1"]),
        ("0,1,2,3", (1, 2), 1, ["0,1"]),
        ("0, 1", (1, 1), None, ["0", "1"]),
        ("GPU-1a,GPU-2b", (1, 1), None, ["GPU-1a", "GPU-2b"]),
        ("0", (1, 1), None, ["0"]),
        ("1,-1,0", (1, 1), None, ["1"]),  # as CUDA reads it
    ],
)
def test_a_worker_has_as_many_gpus_as_one_model_is_spread_over(
    visible: str,
    size: tuple[int, int],
    n_workers: int | None,
    groups: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    numerics = replace(ON_GPUS, tensor_parallel=size[0], pipeline_parallel=size[1])
    places = _gpu_places(numerics, n_workers)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == list(groups)
    # In a process of its own vLLM's engine makes unequal batches of equal calls.
    assert all(place["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" for place in places)


def test_without_the_variable_the_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    places = _gpu_places(ON_GPUS, None)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("visible", "tensor_parallel", "n_workers", "said"),
    [
        ("0,1", 1, 3, "3 workers of 1 devices each, and 2 devices are visible"),
        ("0,1", 4, None, "1 workers of 4 devices each, and 2 devices are visible"),
        ("0,1,2", 2, 2, "2 workers of 2 devices each, and 3 devices are visible"),
        ("", 1, None, "1 workers of 1 devices each, and 0 devices are visible"),
        ("-1", 1, None, "1 workers of 1 devices each, and 0 devices are visible"),
    ],
)
def test_too_few_gpus_are_an_error_that_counts_them(
    visible: str,
    tensor_parallel: int,
    n_workers: int | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ScoringError, match=said):
        _gpu_places(replace(ON_GPUS, tensor_parallel=tensor_parallel), n_workers)


def test_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for n_workers, threads in ((1, "8"), (2, "4"), (3, "2"), (16, "1")):
        assert (
            _cpu_places(n_workers)
            == [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}] * n_workers
        )


def test_on_gpus_each_worker_is_a_process_with_a_device_of_its_own(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    opening = Opening(open_noting, ModelConfig(checkpoint="x"), Checkpoint(desk), 10)
    with workers(opening, ON_GPUS, None) as run:
        told = list(run(whereabouts, [1.0, 1.0, 0.0, 0.0], None))
    by_process = {said["pid"]: said["environment"]["CUDA_VISIBLE_DEVICES"] for said in told}
    assert sorted(by_process.values()) == ["5", "6"]
    assert os.getpid() not in by_process
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6"
    with workers(opening, ON_GPUS, 1) as run:
        ((pid, result),) = run(square, [7], None)
    assert result == 49
    assert pid != os.getpid(), "one worker on a GPU is a process too: its memory belongs to it"
