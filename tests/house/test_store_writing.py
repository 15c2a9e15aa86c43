"""Writing to the store: cut short, on a full disk, by many at once."""

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from stored import files, logprobs
from support import largest_file

from pipeline.errors import StoreError
from pipeline.store import (
    Store,
    commit,
    commit_numbered,
    current_snapshot,
    publish,
    published,
    read,
)
from schemas import LogProb


def test_the_pointer_moves_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, "logprobs", logprobs(), LogProb)

    def crash(pointer: Path, target: Path) -> None:
        assert target.exists(), "the pointer would have pointed at nothing"
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(published, "move_pointer", crash)
        with pytest.raises(KeyboardInterrupt):
            publish(store, "logprobs", logprobs(first=-9.0), LogProb)
    assert read(store, "logprobs").equals(logprobs())
    assert len(files(store)) == 3  # the new snapshot is there, and nobody's
    publish(store, "logprobs", logprobs(first=-9.0), LogProb)
    assert read(store, "logprobs").equals(logprobs(first=-9.0))
    assert len(files(store)) == 3


def test_bytes_are_on_the_disk_before_their_name_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut must find: content, then its name, then the pointer, each made durable."""
    calls: list[str] = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def wrapper(*arguments: Any, **options: Any) -> object:
            target = arguments[0]
            if name == "fsync":
                target = os.readlink(f"/proc/self/fd/{target}")
            kind = "directory" if os.path.isdir(target) else "file"
            calls.append(f"{name} {kind}" if name == "fsync" else name)
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, wrapper)

    for name in ("fsync", "link", "symlink", "replace"):
        spy(name)
    publish(store, "logprobs", logprobs(), LogProb)
    committed = ["fsync file", "link", "fsync directory"]
    assert calls == [*committed, "symlink", "replace", "fsync directory"]
    calls.clear()
    commit_numbered(store.directory, b"x", ".json")
    assert calls == committed


@pytest.mark.parametrize("point", ["fsync", "link", "symlink", "replace"])
def test_a_failing_call_leaves_the_old_table(
    store: Store, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    publish(store, "logprobs", logprobs(), LogProb)

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, point, fail)
        with pytest.raises(StoreError, match=r"logprobs.*: Input/output error"):
            publish(store, "logprobs", logprobs(first=-9.0), LogProb)
    assert read(store, "logprobs").equals(logprobs())
    assert not [name for name in files(store) if name.endswith(".tmp")]


@pytest.mark.parametrize("n_bytes", [0, 1, 4, 1000, 5000, 20_000])
def test_a_write_cut_short_leaves_the_old_table(store: Store, n_bytes: int) -> None:
    old = publish(store, "logprobs", logprobs(), LogProb)
    before = files(store)
    with largest_file(n_bytes), pytest.raises(StoreError) as caught:
        publish(store, "logprobs", logprobs(20_000), LogProb)
    assert str(store.directory / "logprobs") in str(caught.value)
    assert "File too large" in str(caught.value)
    assert files(store) == before
    assert read(store, "logprobs").equals(logprobs())
    assert current_snapshot(store, "logprobs").digest == old.digest
    assert publish(store, "logprobs", logprobs(20_000), LogProb).n_bytes > n_bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=128k,nr_inodes=64", "tmpfs", str(disk)]
    subprocess.run(["mount", *options], check=True)  # needs root, hence one of the slow tests
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_costs_nothing(small_disk: Path) -> None:
    store = Store(small_disk, "test")
    publish(store, "logprobs", logprobs(), LogProb)
    before = files(store)
    with pytest.raises(StoreError) as caught:
        publish(store, "logprobs", logprobs(20_000), LogProb)
    assert "No space left on device" in str(caught.value)
    assert str(store.directory / "logprobs") in str(caught.value)
    with pytest.raises(StoreError, match="No space left on device"):
        commit_numbered(store.directory / "logprobs", bytes(1 << 20), ".json")
    assert files(store) == before
    assert read(store, "logprobs").equals(logprobs())
    publish(store, "logprobs", logprobs(60), LogProb)
    assert read(store, "logprobs").height == 60


def write_numbered(directory: Path, barrier: Barrier, writer: int) -> None:
    barrier.wait(30)
    for i in range(5):
        commit_numbered(directory, f"{writer}-{i}".encode(), ".json")


def test_concurrent_writers_get_distinct_numbers(tmp_path: Path) -> None:
    directory = tmp_path / "manifest"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    writers = [
        context.Process(target=write_numbered, args=(directory, barrier, i)) for i in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    written = sorted(directory.iterdir())
    assert [path.name for path in written] == [f"{n:08d}.json" for n in range(1, 41)]
    contents = {path.read_text() for path in written}
    assert contents == {f"{writer}-{i}" for writer in range(8) for i in range(5)}
    # One writer's files keep its order.
    order = [path.read_text() for path in written]
    assert all(
        order.index(f"{w}-{i}") < order.index(f"{w}-{i + 1}") for w in range(8) for i in range(4)
    )


def test_a_committed_number_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "00000007.json").write_bytes(b"old")
    (tmp_path / "notes.json").write_bytes(b"not a number")
    assert commit_numbered(tmp_path, b"new", ".json") == tmp_path / "00000008.json"
    assert (tmp_path / "00000007.json").read_bytes() == b"old"


def test_two_writers_of_one_content_are_one_file(tmp_path: Path) -> None:
    first = commit(tmp_path, lambda sink: sink.write(b"x"), ".bin")
    inode = first.path.stat().st_ino
    assert commit(tmp_path, lambda sink: sink.write(b"x"), ".bin") == first
    assert first.path.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]
