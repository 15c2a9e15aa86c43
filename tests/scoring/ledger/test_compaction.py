"""Compaction and collection: the same numbers from fewer files, and nothing referenced is lost."""

import shutil
from pathlib import Path

import polars as pl
import pytest
from forks import begin, ended

from pipeline.errors import StoreError
from pipeline.scoring.ledger import collect, compact, scorers, verify_ledger
from pipeline.scoring.ledger.manifests import in_force, present
from scoring.ledger.desk import everything, fake_key, held, made_sequences, put, score


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_many_commits_become_few_and_every_number_stays(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=2)
    before, who = everything(key), scorers(key.ledger)
    done = compact(key.directory)
    assert (done.before, done.after) == (6, 1)
    assert everything(key).equals(before)
    assert scorers(key.ledger).equals(who)
    again = score(key, write_sequences)
    assert (again.n_scored, again.model_loaded) == (0, False)
    assert verify_ledger(key.ledger) == []
    assert compact(key.directory).before == 1


def test_the_first_committed_value_still_wins(tmp_path: Path) -> None:
    """Before and after, for what lies in a compacted run, between two, and comes later."""
    key = fake_key(tmp_path)
    put(key, a=-1.0, b=-2.0)
    put(key, a=-10.0, c=-3.0)
    put(key, c=-30.0, d=-4.0)
    first = held(key)
    assert first == {"a": -1.0, "b": -2.0, "c": -3.0, "d": -4.0}
    compact(key.directory)
    assert held(key) == first
    put(key, a=-100.0, d=-40.0, e=-5.0)
    assert held(key) == {**first, "e": -5.0}
    compact(key.directory)
    collect(key.ledger, remove=True)
    put(key, e=-50.0, f=-6.0)
    assert held(key) == {**first, "e": -5.0, "f": -6.0}


def test_a_run_in_the_middle_keeps_its_place(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    put(key, **dict.fromkeys("0123", -1.0))  # large enough to be left as it is
    put(key, a=-2.0, **{"0": -9.0})
    put(key, b=-3.0, a=-9.0)
    put(key, **dict.fromkeys("a4567", -9.0))
    before = held(key)
    done = compact(key.directory, rows=4)
    assert (done.before, done.after) == (4, 3)
    assert held(key) == before
    orders = [one.order for one in in_force(present(key.directory))]
    assert orders == [1, 2, 4]


def test_a_damaged_merged_commit_gives_way_to_what_it_replaced(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=2)
    before = everything(key)
    compact(key.directory)
    (merged,) = in_force(present(key.directory))
    part = key.directory / "logprobs" / merged.parts["logprobs"].file
    part.write_bytes(part.read_bytes()[:-1])
    assert everything(key).equals(before)
    assert score(key, write_sequences).n_scored == 0
    assert len(in_force(present(key.directory))) == 6


def test_garbage_is_named_first_and_removed_only_when_told(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=2)
    before = everything(key)
    assert collect(key.ledger, remove=True) == []
    compact(key.directory)
    (key.directory / "logprobs" / ".0123.tmp").write_bytes(b"left")
    (key.directory / "logprobs" / f"{'0' * 64}.parquet").write_bytes(b"nobody's")
    all_files = files(key.ledger)
    garbage = collect(key.ledger)
    assert files(key.ledger) == all_files, "a dry run changes nothing"
    whys = [one.why for one in garbage]
    assert whys.count("replaced") == 6
    assert whys.count("no manifest names it") == 13
    assert whys.count("temporary") == 1
    assert sum(one.n_bytes for one in garbage) > 0
    assert collect(key.ledger, remove=True) == garbage
    assert collect(key.ledger) == []
    assert files(key.directory / "logprobs") == [
        in_force(present(key.directory))[0].parts["logprobs"].file
    ]
    assert everything(key).equals(before)
    assert verify_ledger(key.ledger) == []


def test_what_a_damaged_commit_replaces_is_no_garbage(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=2)
    before = everything(key)
    compact(key.directory)
    (merged,) = in_force(present(key.directory))
    part = key.directory / "token_logprobs" / merged.parts["token_logprobs"].file
    part.write_bytes(b"")
    assert not [one for one in collect(key.ledger, remove=True) if one.why == "replaced"]
    assert everything(key).equals(before)


def test_a_number_is_never_given_out_twice(tmp_path: Path) -> None:
    """Or a late reader would set aside a good commit for a damaged one of the same name."""
    key = fake_key(tmp_path)
    put(key, a=-1.0)
    put(key, b=-2.0)
    last = key.directory / "manifest" / "00000002.json"
    last.write_text("damaged")
    assert held(key) == {"a": -1.0}
    collect(key.ledger, remove=True)
    put(key, c=-3.0)
    names = sorted(path.name for path in last.parent.iterdir())
    assert names == ["00000001.json", "00000003.json"]
    assert held(key) == {"a": -1.0, "c": -3.0}
    assert [one.why for one in collect(key.ledger, remove=True)] == ["set aside"]


def append_many(root: Path, first: int, n: int) -> None:
    key = fake_key(root)
    for sequences in made_sequences(n, seed=first).iter_slices(2):
        score(key, sequences)


def tidy_up(root: Path, times: int) -> None:
    key = fake_key(root)
    for _ in range(times):
        compact(key.directory)
        collect(key.ledger, remove=True)


def test_writers_and_readers_beside_compaction_and_collection_lose_nothing(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    append_many(tmp_path, 0, 4)
    seen = everything(key)
    processes = [begin(append_many, tmp_path, seed, 8) for seed in (1, 2)]
    processes += [begin(tidy_up, tmp_path, 10) for _ in range(2)]
    while any(process.is_alive() for process in processes):
        now = everything(key)
        old = now.filter(pl.col("sequence_id").is_in(seen["sequence_id"].to_list()))
        assert old.equals(seen), "a number that was read is read again"
        seen = now
    assert [ended(process) for process in processes] == [0] * 4
    assert everything(key).height == 2 * (4 + 8 + 8)
    assert not (key.directory / "set_aside").exists()
    assert verify_ledger(key.ledger) == []


def test_verify_names_what_is_wrong_and_changes_nothing(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences, commit_rows=4)
    assert verify_ledger(key.ledger) == []
    one, two, three = in_force(present(key.directory))
    part = key.directory / "logprobs" / one.parts["logprobs"].file
    part.write_bytes(part.read_bytes() + b"x")
    two.path.write_text("{}")
    (key.directory / "token_logprobs" / three.parts["token_logprobs"].file).unlink()
    state = files(key.ledger)
    faults = verify_ledger(key.ledger)
    assert {(fault.path.parent.name, fault.path.name) for fault in faults} == {
        ("logprobs", part.name),
        ("manifest", two.path.name),
        ("token_logprobs", three.parts["token_logprobs"].file),
    }
    assert files(key.ledger) == state


def test_verify_finds_a_scorer_in_another_ones_place(
    tmp_path: Path, write_sequences: pl.DataFrame
) -> None:
    key = fake_key(tmp_path)
    score(key, write_sequences)
    shutil.copytree(key.directory, key.directory.parent / ("0" * 32))
    faults = verify_ledger(key.ledger)
    assert any("its scorer's ids are" in fault.what for fault in faults)
    assert any("another scorer's" in fault.what for fault in faults)
    assert all("0" * 32 in str(fault.path) for fault in faults)


def test_verify_finds_sums_that_are_not_those_of_their_tokens(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    put(key, a=-1.0)
    from pipeline.scoring.ledger import append
    from scoring.ledger.desk import PROVENANCE, B, rows

    sums, tokens = rows(key, {B: -2.0})
    append(key, sums.with_columns(logprob=pl.lit(-2.5)), tokens, PROVENANCE)
    (fault,) = verify_ledger(key.ledger)
    assert fault.path.name == "00000002.json"
    assert fault.what == "1 sums are not those of their tokens"


def test_a_file_system_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("in the way")
    with pytest.raises(StoreError, match="ledger"):
        put(fake_key(tmp_path), a=-1.0)
