"""Every format in every compression gives equal rows; bombs and UTF-16 are refused."""

import bz2
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from backports import zstd

from pipeline.errors import SourceError
from pipeline.sources import SUFFIXES, frame_rows
from pipeline.sources.files import streams
from pipeline.sources.files.formats import format_of

ROWS = [{"chosen": f'yes "{i}" é', "rejected": "no\n", "score": i / 2} for i in range(300)]
FRAME = pl.DataFrame(ROWS)


def written(save: Callable[[io.BytesIO], object]) -> bytes:
    out = io.BytesIO()
    save(out)
    return out.getvalue()


FORMATS = {
    ".jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
    ".ndjson": written(FRAME.write_ndjson),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": written(FRAME.write_csv),
    ".tsv": written(lambda out: FRAME.write_csv(out, separator="\t")),
    ".parquet": written(FRAME.write_parquet),
    ".arrow": written(FRAME.write_ipc_stream),
}


def halves(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: pack(data[: len(data) // 2]) + pack(data[len(data) // 2 :])


def zstd_checked(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


SKIPPABLE = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"
PACKS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "plain": ("", bytes),
    "gzip": (".gz", gzip.compress),
    "gzip members": (".gz", halves(gzip.compress)),
    "zstd": (".zst", zstd.compress),
    "zstd frames": (".zst", halves(zstd.compress)),
    "zstd after a skippable frame": (".zst", lambda data: SKIPPABLE + zstd.compress(data)),
    "unpacked on the way": (".gz", bytes),
    "packed without saying so": ("", zstd.compress),
}


def test_every_suffix_is_tried() -> None:
    assert {s + p for s in FORMATS for p, _ in PACKS.values()} == set(SUFFIXES)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("pack", PACKS)
def test_equal_rows_and_right_places(tmp_path: Path, suffix: str, pack: str) -> None:
    ending, compress = PACKS[pack]
    data = FORMATS[suffix]
    path = tmp_path / f"rows{suffix}{ending}"
    path.write_bytes(compress(data))
    rows = list(frame_rows(path))
    assert [json.loads(row.data) for row in rows] == ROWS
    assert [row.row for row in rows] == list(range(len(ROWS)))
    if suffix in (".parquet", ".arrow"):
        assert {row.byte_offset for row in rows} == {None}
        return
    for row in rows:
        begins = b'"yes ""%d""' % row.row if suffix in (".csv", ".tsv") else row.data
        assert data[row.byte_offset :].startswith(begins)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("pack", ["gzip", "zstd"])
def test_a_file_without_a_suffix_is_told_by_its_bytes(
    tmp_path: Path, suffix: str, pack: str
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(PACKS[pack][1](FORMATS[suffix]))
    assert [json.loads(row.data) for row in frame_rows(path)] == ROWS


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("a.jsonl", b"[1]", "json_lines"), ("a.jsonl", b"PAR1", "json_lines"),
        ("a.json", b"\n [", "json_array"), ("a.json", b" {", "json_lines"),
        ("a.JSON.GZ", b"[", "json_array"), ("a.csv", b"[", "csv"), ("a.tsv.zst", b"", "tsv"),
        ("a", b"", "json_lines"), ("a.txt", b"[", "json_array"), ("a.gz", b"PAR1", "parquet"),
        ("a", b"ARROW1", "arrow"), ("jsonl", b"[", "json_array"), ("a.parquet", b"", "parquet"),
    ],
)  # fmt: skip
def test_the_name_goes_before_the_bytes(name: str, head: bytes, expected: str) -> None:
    assert format_of(name, head) == expected


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("compress", [gzip.compress, zstd_checked], ids=["gzip", "zstd"])
def test_broken_compression_is_an_error(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    packed = compress(FORMATS[suffix])
    path = tmp_path / f"rows{suffix}"
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 1
    for data in (packed[:-1], packed[: len(packed) // 2], packed + b"junk", bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=f"{path}: cannot be read: "):
            list(frame_rows(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_utf_16_is_said_to_be_that(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(("\ufeff" + FORMATS[suffix].decode()).encode(encoding))
    with pytest.raises(SourceError, match="UTF-16"):
        list(frame_rows(path))


BOMBS = [gzip.compress(bytes(1 << 26)), zstd.compress(bytes(1 << 26))]


@pytest.mark.parametrize("bomb", BOMBS, ids=["gzip", "zstd"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_bomb_is_refused_before_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, bomb: bytes
) -> None:
    monkeypatch.setattr(streams, "MUCH", 8 << 20)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(SourceError, match=r"more than 200 times its compressed [\d,]+ bytes"):
        list(frame_rows(path))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_what_packs_well_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a":"same"}\n' * 1_000_000))
    assert sum(1 for _ in frame_rows(path)) == 1_000_000


def test_a_zstd_window_that_would_take_gigabytes_is_refused(tmp_path: Path) -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 31})
    (tmp_path / "rows.jsonl.zst").write_bytes(
        compressor.compress(bytes(1 << 20), compressor.FLUSH_BLOCK) + compressor.flush()
    )
    with pytest.raises(SourceError, match="cannot be read"):
        list(frame_rows(tmp_path / "rows.jsonl.zst"))


def test_a_compression_that_is_not_known_ends_in_quarantine_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(bz2.compress(FORMATS[".jsonl"]))
    assert list(frame_rows(path))
    path = tmp_path / "rows.parquet"
    path.write_bytes(bz2.compress(FORMATS[".parquet"]))
    with pytest.raises(SourceError):
        list(frame_rows(path))
