"""Files by path, folder, glob and URL; what they are called; when their digests change."""

import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.sources import frame_rows
from pipeline.sources.files import SourceFile, digests, locations, source_digest, source_files


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json.dumps({"name": name}).encode())


def names(location: str | Path) -> list[str]:
    return [file.name for file in source_files("s", location)]


def read(location: str | Path) -> list[str]:
    """Each file's own name, as written in it."""
    files = source_files("s", location)
    return [json.loads(row.data)["name"] for file in files for row in frame_rows(file)]


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_a_file_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    write(tmp_path, "rows", "a[1]*.txt", ".hidden.jsonl")
    for name in ("rows", "a[1]*.txt", ".hidden.jsonl"):
        assert source_files("s", tmp_path / name) == [SourceFile(name, str(tmp_path / name))]
        assert read(str(tmp_path / name)) == [name]


def test_a_folder_gives_its_data_files_by_name(tmp_path: Path) -> None:
    data = ["a.jsonl", "b/c.JSONL", "b/d.ndjson", "e.json", "split=x/y.json"]
    write(tmp_path, *data, "README.md", "x.txt", ".git/y.jsonl", "._a.jsonl", "b/dataset_info.json")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert names(tmp_path) == read(tmp_path) == read(f"{tmp_path}/") == data
    os.symlink(tmp_path / "e.json", tmp_path / "f.json")
    assert "f.json" in names(tmp_path)
    # A link that leads nowhere is not passed over in silence.
    os.symlink(tmp_path / "gone", tmp_path / "g.json")
    with pytest.raises(SourceError, match=r"g\.json: cannot be read"):
        read(tmp_path)


def test_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x/a1.jsonl", "x/a2.jsonl", "x/b1.jsonl", "x/y/a3.jsonl", "x/a4.txt")
    assert names(f"{tmp_path}/x/a*.jsonl") == ["a1.jsonl", "a2.jsonl"]
    assert names(tmp_path / "x" / "a*") == ["a1.jsonl", "a2.jsonl"]
    assert names(f"{tmp_path}/x/**/a?.jsonl") == ["a1.jsonl", "a2.jsonl", "y/a3.jsonl"]
    assert names(f"{tmp_path}/*/[b]1.jsonl") == ["x/b1.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert names("*/a*.jsonl") == read("*/a*.jsonl") == ["x/a1.jsonl", "x/a2.jsonl"]
    with pytest.raises(SourceError, match=r"source 's': .*/x/q\*: no file ends in \.jsonl, "):
        names(f"{tmp_path}/x/q*")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"source 's': .*/none: no such file or folder"):
        names(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"source 's': .*/empty: no file ends in \.jsonl, "):
        names(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no such file or folder"):
        names(tmp_path / "pipe")


NAMES = [
    "a\\..\\b.jsonl", "C:\\x.jsonl", "model=evil/x.jsonl", "x[12].jsonl", "*.jsonl", "?.jsonl",
    " .jsonl", "a .jsonl", "x" * 200 + ".jsonl", "é.jsonl", "e\u0301.jsonl", "A.jsonl", "a.jsonl",
    "😀.jsonl", "a\nb.jsonl", "{a,b}.jsonl", "~.jsonl", "a%2Fb.jsonl", "a#b.jsonl", "$x.jsonl",
    "a/b.jsonl", "a:b.jsonl", "-rf.jsonl", "..x/y.jsonl", "..x.jsonl", "\u202egnp.jsonl",
]  # fmt: skip


def test_names_are_kept_as_they_are_and_none_stands_for_another(tmp_path: Path) -> None:
    write(tmp_path, *NAMES)
    shown = [name for name in NAMES if not name.startswith("..")]  # hidden, as any with a dot
    assert sorted(names(tmp_path)) == sorted(read(tmp_path)) == sorted(shown)
    for name in NAMES:
        if "/" not in name:
            assert read(tmp_path / name) == [name]


def test_a_name_no_table_can_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(b"{}")
    for location in (tmp_path, tmp_path / os.fsdecode(b"\xff.jsonl"), f"{tmp_path}/*"):
        with pytest.raises(SourceError, match="name is not UTF-8") as caught:
            names(location)
        str(caught.value).encode()


@settings(max_examples=200, deadline=None)
@given(st.sets(st.text("ab./=*[]{}é\n ", min_size=1, max_size=12)))
def test_what_holds_rows_is_told_from_the_names_alone(found: set[str]) -> None:
    given_names = {str(Path(name)) + ".jsonl" for name in found}
    kept = locations.data_files(given_names)
    assert kept == sorted(set(kept))
    assert set(kept) == {
        name for name in given_names
        if not any(part.startswith(".") for part in Path(name).parts)
    }  # fmt: skip


# What `datasets` writes


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"chosen": [{"role": "assistant", "content": f"é {i}"}], "rejected": None, "score": i / 3}
        for i in range(250)
    ]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=3)
    saved.map(lambda row: row, cache_file_name=str(tmp_path / "one" / "cache-1.arrow"))
    assert (tmp_path / "one" / "cache-1.arrow").exists()
    assert names(tmp_path / "one") == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    found = [r for f in source_files("s", tmp_path / "one") for r in frame_rows(f)]
    assert [json.loads(row.data) for row in found] == rows
    datasets.DatasetDict(train=saved, test=saved.select(range(9))).save_to_disk(
        str(tmp_path / "two")
    )
    assert names(tmp_path / "two") == [
        "test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow",
    ]  # fmt: skip
    saved.to_parquet(str(tmp_path / "rows.parquet"))
    assert [json.loads(row.data) for row in frame_rows(tmp_path / "rows.parquet")] == rows
    # The same names mean nothing elsewhere.
    write(tmp_path, "other/state.json", "other/cache-1.arrow")
    assert names(tmp_path / "other") == ["cache-1.arrow", "state.json"]


# URLs


def test_urls_of_files_folders_and_globs(memory: Any) -> None:
    for name in ("a.jsonl", "b/c.jsonl", "b/.d.jsonl", "b/e.txt", "x[1].jsonl"):
        memory.pipe(f"/top/{name}", json.dumps({"name": name}).encode())
    assert source_files("s", "memory://top/b/c.jsonl") == [
        SourceFile("c.jsonl", "memory://top/b/c.jsonl")
    ]
    for folder in ("memory://top", "memory://top/", "memory:///top"):
        assert names(folder) == read(folder) == ["a.jsonl", "b/c.jsonl", "x[1].jsonl"]
    assert (
        names("memory://top/*.jsonl") == read("memory://top/*.jsonl") == ["a.jsonl", "x[1].jsonl"]
    )
    assert read("memory://top/**/c.jsonl") == ["b/c.jsonl"]
    assert read("memory://top/b/e.txt") == ["b/e.txt"]
    assert read("memory://top/x[1].jsonl") == ["x[1].jsonl"]
    for gone in ("memory://none", "memory://top/none.jsonl"):
        with pytest.raises(SourceError, match=r"source 's': memory://.*: no such file or folder"):
            names(gone)
    with pytest.raises(SourceError, match="no file ends in"):
        names("memory://top/*.txt")


@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_read_from_a_url(memory: Any, packed: bool) -> None:
    import polars as pl

    frame = pl.DataFrame({"chosen": ["a", "b"]})
    ways: dict[str, Callable[[io.BytesIO], object]] = {
        "parquet": frame.write_parquet,
        "arrow": frame.write_ipc,
        "csv": frame.write_csv,
        "jsonl": frame.write_ndjson,
        "json": frame.write_json,
    }
    for suffix, save in ways.items():
        out = io.BytesIO()
        save(out)
        data = gzip.compress(out.getvalue()) if packed else out.getvalue()
        memory.pipe(f"/rows.{suffix}", data)
        found = list(frame_rows(SourceFile(f"rows.{suffix}", f"memory://rows.{suffix}")))
        assert [json.loads(row.data) for row in found] == frame.to_dicts()


def test_a_protocol_that_needs_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SourceError, match=r"source 's': s3://bucket/x: .*[Ii]nstall s3fs"):
        names("s3://bucket/x?key=secret")
    with pytest.raises(SourceError, match="s3fs"):
        source_digest(SourceFile("x", "s3://bucket/x"))
    with pytest.raises(SourceError, match="s3fs"):
        list(frame_rows(SourceFile("x", "s3://bucket/x")))
    with pytest.raises(SourceError, match="nosuch"):
        names("nosuch://bucket/x")
    with pytest.raises(SourceError, match="chained"):
        names("zip://a::memory://b")


def test_the_hub_is_known_and_a_hub_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(SourceError, match=r"source 's': hf://datasets/org/repo/x\.jsonl: "):
        names("hf://datasets/org/repo/x.jsonl")  # the tests run offline


def test_a_web_address_is_one_file_whose_query_stays_secret() -> None:
    (file,) = source_files("s", "https://user:pw@host/a/b.jsonl?sig=secret#x")
    assert file.name == "b.jsonl"
    assert file.shown == "https://host/a/b.jsonl"


# Digests


def test_a_local_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}")
    file = SourceFile("a.jsonl", str(path))
    before = source_digest(file)
    os.utime(path, (0, 0))
    assert source_digest(file) == before
    path.write_bytes(b"{ }")
    assert source_digest(file) != before
    with pytest.raises(SourceError, match="none: cannot be read"):
        source_digest(SourceFile("none", str(tmp_path / "none")))


def test_a_remote_digest_is_that_of_the_bytes_where_no_checksum_is_known(
    memory: Any, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"{}")
    memory.pipe("/a.jsonl", b"{}")
    remote = SourceFile("a.jsonl", "memory://a.jsonl")
    assert source_digest(remote) == source_digest(SourceFile("a", str(tmp_path / "a")))
    memory.pipe("/a.jsonl", b"{ }")
    assert source_digest(remote) != source_digest(SourceFile("a", str(tmp_path / "a")))


@pytest.mark.parametrize(
    ("protocol", "info", "expected"),
    [
        ("s3", {"ETag": '"abc-2"', "LastModified": 1}, "abc-2"),
        ("hf", {"blob_id": "git", "lfs": {"sha256": "big"}}, "big"),
        ("hf", {"blob_id": "git", "lfs": None}, "git"),
        ("gs", {"md5Hash": "m", "crc32c": "c"}, "m"),
        ("gs", {"crc32c": "c", "updated": 1}, "c"),
        ("memory", {"created": 1, "ETag": "x"}, None),
        ("s3", {"LastModified": 1}, None),
    ],
)
def test_which_checksums_are_of_the_content(
    protocol: str, info: dict[str, Any], expected: str | None
) -> None:
    assert digests._checksum(protocol, info) == expected
