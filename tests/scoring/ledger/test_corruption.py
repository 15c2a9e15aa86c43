"""Corrupted files: every one is noticed, set aside and scored again; no wrong number is read."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support import measured

from pipeline.scoring.ledger import ScorerKey, read_logprobs, read_token_logprobs, verify_ledger
from pipeline.scoring.ledger.manifests import present
from scoring.ledger.desk import everything, fake_key, made_sequences, score

SEQUENCES, COMMIT_ROWS = made_sequences(6, seed=3), 4


def flip(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, generator: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(1, len(data))])


def zero_page(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    page = slice((at := generator.randrange(len(data)) // 256 * 256), at + 256)
    data[page] = bytes(len(data[page]))
    path.write_bytes(data)


def append_junk(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes() + generator.randbytes(generator.randint(1, 4096)))


def swap(path: Path, generator: random.Random) -> None:
    """A valid file of the same kind in its place, and it in that one's."""
    others = [p for p in sorted(path.parent.iterdir()) if p != path and p.suffix == path.suffix]
    other = generator.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def empty(path: Path, generator: random.Random) -> None:
    path.write_bytes(b"")


def directory(path: Path, generator: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_bytes(b"x")


def symlink(path: Path, generator: random.Random) -> None:
    """To a good copy elsewhere, which somebody may change at any time; or to nothing."""
    copy = path.parent.parent.parent.parent.parent / f"copy-{generator.random()}"
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy if generator.random() < 0.5 else path.parent / "nothing")


def edit(path: Path, generator: random.Random) -> None:
    """A manifest that is still JSON, with something in its body changed; a part gets other rows."""
    if path.suffix == ".parquet":
        flip(path, generator)
        return
    sealed = json.loads(path.read_text())
    body = json.loads(sealed["body"])
    part = generator.choice(sorted(body["parts"]))
    body["parts"][part][generator.choice(["bytes", "rows"])] += 1
    sealed["body"] = json.dumps(body, sort_keys=True)
    path.write_text(json.dumps(sealed))


def remove(path: Path, generator: random.Random) -> None:
    path.unlink()


KINDS: list[Callable[[Path, random.Random], None]] = [
    flip,
    truncate,
    zero_page,
    append_junk,
    swap,
    empty,
    directory,
    symlink,
    edit,
    remove,
]


def committed_files(key: ScorerKey) -> list[Path]:
    """Every manifest and every part a manifest names (others are leftovers nobody reads)."""
    return [
        path
        for one in present(key.directory)
        for path in (
            one.path,
            *(key.directory / name / part.file for name, part in one.parts.items()),
        )
    ]


def corrupt(tmp_path: Path, seeds: range) -> Counter[tuple[str, str]]:
    """Damage one file after another, each followed by a pass that mends it."""
    key = fake_key(tmp_path)
    score(key, SEQUENCES, commit_rows=COMMIT_ROWS)
    good = everything(key)
    seen: Counter[tuple[str, str]] = Counter()
    for seed in seeds:
        generator = random.Random(seed)
        path = generator.choice(committed_files(key))
        kind = KINDS[seed % len(KINDS)]
        before = path.read_bytes()
        kind(path, generator)
        said = f"seed {seed}: {kind.__name__} of {path.parent.name}/{path.name}"
        if path.is_file() and not path.is_symlink() and path.read_bytes() == before:
            continue  # a page of zeros is one already
        seen[path.parent.name, kind.__name__] += 1
        faults = verify_ledger(key.ledger)
        assert faults or kind in (remove, swap), f"{said}: verify did not notice"
        aside = len(list((key.directory / "set_aside").glob("*")))
        left = read_logprobs(key), read_token_logprobs(key)
        assert min(frame.height for frame in left) < good.height or kind is swap, (
            f"{said}: not noticed"
        )
        for frame in left:
            ids = frame["sequence_id"].to_list()
            expected = good.select(frame.columns).filter(good["sequence_id"].is_in(ids))
            assert frame.equals(expected), f"{said}: a wrong number was read"
        if faults:
            assert len(list((key.directory / "set_aside").glob("*"))) > aside, f"{said}: not aside"
        score(key, SEQUENCES, commit_rows=COMMIT_ROWS)
        assert everything(key).equals(good), f"{said}: not mended"
        assert verify_ledger(key.ledger) == [], said
    return seen


def test_every_corruption_is_noticed_and_mended(tmp_path: Path) -> None:
    seen = corrupt(tmp_path, range(60))
    assert {kind for _, kind in seen} == {kind.__name__ for kind in KINDS}
    assert {where for where, _ in seen} == {"manifest", "logprobs", "token_logprobs"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_hundred_corruptions_are_noticed_and_mended(tmp_path: Path) -> None:
    seen = corrupt(tmp_path, range(1000, 1520))
    measured(f"{seen.total()} corruptions in {len(seen)} kinds, all noticed and mended")
    assert seen.total() >= 500
    assert len(seen) == 3 * len(KINDS)
