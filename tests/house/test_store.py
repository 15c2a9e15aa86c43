"""The store: immutable snapshots, kept contracts, readers that trust nothing."""

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pandera.errors
import polars as pl
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from stored import files, logprobs

from pipeline.errors import StoreError
from pipeline.store import (
    Store,
    commit_numbered,
    current_snapshot,
    move_pointer,
    publish,
    publish_file,
    read,
    read_snapshot,
)
from schemas import LogProb, QuarantinedRow, TokenLogProb, polars_schema


def test_a_table_comes_back_as_it_was(store: Store) -> None:
    frame = logprobs()
    snapshot = publish(store, "logprobs", frame, LogProb)
    assert read(store, "logprobs").equals(frame)
    assert read(store, "logprobs").schema == frame.schema
    data = snapshot.path.read_bytes()
    assert snapshot.digest == snapshot.path.stem == blake3(data).hexdigest()
    assert (snapshot.n_bytes, snapshot.n_rows) == (len(data), frame.height)
    assert current_snapshot(store, "logprobs").path == snapshot.path
    pointer = store.current("logprobs")
    assert os.readlink(pointer) == snapshot.path.name
    # Any Parquet reader may follow the pointer.
    assert duckdb.execute(
        "select sum(n_tokens) from read_parquet(?)", [str(pointer)]
    ).fetchall() == [(50 * 51 // 2,)]


def test_equal_frames_are_one_snapshot_and_others_are_kept(store: Store) -> None:
    first = publish(store, "logprobs", logprobs(), LogProb)
    again = publish(store, "logprobs", pl.concat([logprobs()[:20], logprobs()[20:]]), LogProb)
    assert again == first
    other = publish(store, "logprobs", logprobs(first=-2.0), LogProb)
    assert other.digest != first.digest
    assert files(store) == {first.path.name, other.path.name, "current.parquet"}
    assert read_snapshot(first.path, "logprobs").equals(logprobs())
    assert read(store, "logprobs").equals(logprobs(first=-2.0))


def test_an_empty_table_keeps_its_schema(store: Store) -> None:
    publish(store, "logprobs", logprobs(0), LogProb)
    assert read(store, "logprobs").schema == polars_schema(LogProb)


def test_files_of_two_kinds_share_a_folder(store: Store) -> None:
    page = publish_file(store, "reports/dpo", b"<p>", ".html")
    publish_file(store, "reports/dpo", b"{}", ".json")
    assert store.current("reports/dpo", ".html").read_bytes() == b"<p>"
    assert store.current("reports/dpo", ".json").read_bytes() == b"{}"
    assert current_snapshot(store, "reports/dpo", ".html") == page


def test_an_unpublished_table_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match="nothing has been published under 'logprobs'"):
        read(store, "logprobs")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_published_number_is_nan_or_infinite(store: Store, bad: float) -> None:
    frame = logprobs().with_columns(logprob=pl.Series([-1.0] * 49 + [bad]))
    with pytest.raises(StoreError, match="table 'logprobs': 1 values of 'logprob' are NaN or inf"):
        publish(store, "logprobs", frame, LogProb)
    lists = (
        logprobs(3)
        .select("model_id", "numerics_id", "sequence_id")
        .with_columns(logprobs=pl.Series([[-1.0], [-1.0, bad], [bad]], dtype=pl.List(pl.Float32)))
    )
    with pytest.raises(StoreError, match="2 values of 'logprobs'"):
        publish(store, "tokens", lists, TokenLogProb)
    assert not store.directory.exists()


@pytest.mark.parametrize(
    "breach",
    [
        lambda frame: frame.drop("n_tokens"),
        lambda frame: frame.with_columns(extra=1),
        lambda frame: frame.select(reversed(frame.columns)),
        lambda frame: frame.with_columns(pl.col("n_tokens").cast(pl.Float64)),
        lambda frame: frame.with_columns(n_tokens=pl.lit(0, pl.Int64)),
        lambda frame: frame.with_columns(logprob=pl.lit(None, pl.Float64)),
        lambda frame: pl.concat([frame, frame[:1]]),  # sequence_id is unique
        lambda frame: frame.with_columns(model_id=pl.lit("A" * 32)),
        lambda frame: frame.with_columns(model_id=pl.lit("a" * 32 + "\n")),
    ],
)
def test_a_frame_that_breaks_its_contract_is_refused(
    store: Store, breach: Callable[[pl.DataFrame], pl.DataFrame]
) -> None:
    publish(store, "logprobs", logprobs(), LogProb)
    with pytest.raises(pandera.errors.SchemaErrors):
        publish(store, "logprobs", breach(logprobs()), LogProb)
    assert read(store, "logprobs").equals(logprobs())
    assert len(files(store)) == 2


def corruptions(good: bytes, seed: int = 20) -> Iterator[tuple[str, bytes]]:
    """About a hundred ways a file can be damaged."""
    draw = random.Random(seed)
    for _ in range(50):
        at, bit = draw.randrange(len(good)), 1 << draw.randrange(8)
        yield f"bit {bit} of byte {at}", good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :]
    for _ in range(20):
        length = draw.randrange(len(good))
        yield f"cut to {length}", good[:length]
    for _ in range(20):
        junk = draw.randbytes(draw.randint(1, 64))
        yield f"{len(junk)} bytes appended", good + junk
    for _ in range(10):
        at = draw.randrange(len(good) - 64)
        zeroed = good[:at] + bytes(64) + good[at + 64 :]
        yield f"64 zeros at {at}", zeroed if zeroed != good else zeroed[:-1]
    yield "empty", b""
    yield "two copies", good + good


def test_every_corruption_is_found(store: Store) -> None:
    frame = logprobs()
    path = publish(store, "logprobs", frame, LogProb).path
    good = path.read_bytes()
    undetected = []
    for what, data in corruptions(good):
        assert data != good
        path.write_bytes(data)
        with contextlib.suppress(StoreError):
            read(store, "logprobs")
            undetected.append(what)
        # A good read in between must not vouch for the next damage, however soon it comes.
        path.write_bytes(good)
        assert read(store, "logprobs").equals(frame)
    assert undetected == []


def test_a_missing_or_replaced_snapshot_is_found(store: Store) -> None:
    path = publish(store, "logprobs", logprobs(), LogProb).path
    path.unlink()
    with pytest.raises(StoreError, match=f"{path}: is the current snapshot of 'logprobs' and is m"):
        read(store, "logprobs")
    with pytest.raises(StoreError, match=f"{path}: cannot be read: No such file"):
        read_snapshot(path, "logprobs")
    path.mkdir()
    with pytest.raises(StoreError, match=f"{path}: cannot be read: Is a directory"):
        read(store, "logprobs")
    path.rmdir()
    path.write_bytes(b"")
    with pytest.raises(StoreError, match=f"{path}: damaged"):
        read(store, "logprobs")


def test_a_valid_file_of_another_table_is_refused(store: Store) -> None:
    row = {"source": "s", "file": "f", "row": 0, "unit": 0, "byte_offset": 0,
           "rule": "r", "rule_version": 1, "detail": "d", "raw": ""}  # fmt: skip
    other = publish(store, "quarantine", pl.DataFrame([row]), QuarantinedRow).path
    path = publish(store, "logprobs", logprobs(), LogProb).path
    # Over the right name: the hash betrays it.
    good = path.read_bytes()
    shutil.copy(other, path)
    with pytest.raises(StoreError, match="damaged"):
        read(store, "logprobs")
    path.write_bytes(good)
    # Under its own name, with the pointer moved to it: the name inside the file betrays it.
    moved = Path(shutil.copy(other, path.parent))
    move_pointer(store.current("logprobs"), moved)
    with pytest.raises(StoreError, match="is a 'quarantine' table, not 'logprobs'"):
        read(store, "logprobs")


def test_a_plain_parquet_file_is_no_table(store: Store, tmp_path: Path) -> None:
    logprobs().write_parquet(tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    path = store.directory / "logprobs" / f"{blake3(data).hexdigest()}.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    move_pointer(store.current("logprobs"), path)
    with pytest.raises(StoreError, match="not 'logprobs'"):
        read(store, "logprobs")


def test_publishing_mends_a_damaged_snapshot(store: Store) -> None:
    path = publish(store, "logprobs", logprobs(), LogProb).path
    path.write_bytes(b"damaged")
    publish(store, "logprobs", logprobs(), LogProb)
    assert read(store, "logprobs").equals(logprobs())
    assert files(store) == {path.name, "current.parquet"}


def test_parquet_pages_carry_checksums(store: Store) -> None:
    """For readers that look at them; a flipped data byte fails there without our help."""
    path = publish(store, "logprobs", logprobs(2000), LogProb).path
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    damaged = path.with_name("x.parquet")
    damaged.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(damaged, page_checksum_verification=True)


@pytest.mark.parametrize("name", ["model=evil", "x[12]", "*", "a?", "{a,b}", "tab\tle", "β 😀"])
def test_a_path_is_no_pattern_and_no_partition(tmp_path: Path, name: str) -> None:
    """Polars would add a column `model` of 'evil', and read x1 and x2 for `x[12]`."""
    root = tmp_path / name
    for decoy in ("x1", "x2", "a1", "a", "b"):
        publish(Store(tmp_path / decoy, "test"), "logprobs", logprobs(first=-99.0), LogProb)
    for plan in (name, "model_id=evil"):
        store = Store(root, plan)
        publish(store, "logprobs", logprobs(), LogProb)
        assert read(store, "logprobs").equals(logprobs())
        commit_numbered(store.directory / "n", b"1", ".json")
        assert commit_numbered(store.directory / "n", b"2", ".json").name == "00000002.json"
