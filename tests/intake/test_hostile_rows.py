"""Whatever bytes a source holds, its rows add up, or a typed error says why it cannot be read."""

import json
import shutil
import tempfile
from pathlib import Path

import polars as pl
import pytest
from desk import GOOD, row
from hypothesis import given, settings
from hypothesis import strategies as st
from published import FILES

from pipeline.errors import SourceError
from pipeline.intake import run_intake
from pipeline.plan import Plan
from pipeline.store import Store, read

SEEDS = [
    *(json.dumps(r, ensure_ascii=False).encode() for r in GOOD),
    json.dumps(row("q", "b", "a")).encode(),
    *(json.dumps(file.rows[0]).encode() for file in FILES.values()),
    b'{"chosen":"\\ud800","rejected":1e999,"prompt":NaN}',
    b'{"prompt":[{"role":"user","content":"\xff"}]}',
    b"[" * 300,
    b"\xef\xbb\xbf{}",
    b"\x00",
    b"",
]


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A row, as it was or with some bytes replaced, dropped or put in."""
    line = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(line)))
        end = draw(st.integers(start, min(len(line), start + 9)))
        line = line[:start] + draw(st.binary(max_size=5)) + line[end:]
    return line


SOURCES = st.lists(spoilt() | st.binary(max_size=40), max_size=12).map(b"\n".join)
PLANS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([None, "conversational", "standard", "helpsteer", "scored"]),
        "pairing": st.sampled_from(["best_worst", "all"]),
    }
)


def n_lines(data: bytes) -> int:
    """Lines that hold more than white space, counted without our framing."""
    return sum(
        line.strip(b" \t\r") != b"" for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    )


def holds(data: bytes, held: bytes, options: dict[str, object]) -> bool:
    """Take two sources in; whether they could be read. The tables must add up if so."""
    folder = Path(tempfile.mkdtemp())
    try:
        for name, content in (("s", data), ("held", held)):
            (folder / f"{name}.jsonl").write_bytes(content)
        plan = Plan.model_validate(
            {
                "name": "test",
                "sources": {"s": {"path": folder / "s.jsonl", **options}},
                "evaluation": {"held": {"path": folder / "held.jsonl", "shape": "conversational"}},
                "models": {"m": {"checkpoint": "none"}},
                "rules": {"invalid_json": {"at_most": 0.5}},
            }
        )
        store = Store(folder / "store", "test")
        try:
            result = run_intake(plan, store)
        except SourceError:
            return False
        assert result.law["holds"].all(), result.law
        expected = {"s": n_lines(data), "held": n_lines(held)}
        assert dict(result.law.select("source", "n_in").iter_rows()) == expected
        rows, quarantine = read(store, "rows"), read(store, "quarantine")
        assert rows.height == sum(expected.values())
        assert rows.select("source", "row").is_unique().all()
        # Who is quarantined is so for a reason; who is accepted is a pair or a label.
        lost = rows.filter(disposition="quarantined").join(
            quarantine, on=["source", "file", "row"], how="anti"
        )
        assert lost.is_empty(), lost
        named = pl.coalesce("pair_id", "label_id")
        pairs, labels = read(store, "pairs"), read(store, "labels")
        kept = rows.filter(pl.col("disposition") != "quarantined")
        # A row of a list names the first of its pairs, and each pair the row that gave it first.
        assert set(kept.select(named)["pair_id"]) <= {*pairs["pair_id"], *labels["label_id"]}
        votes = pl.concat([pairs["votes"], labels["votes"]])
        assert kept["n_units"].sum() == votes.sum()
        places = pl.concat([table.select("file", "row") for table in (pairs, labels)])
        given = rows.filter(disposition="accepted").select("file", "row")
        assert places.join(given, on=["file", "row"], how="anti").is_empty()
        assert not list(folder.glob("store/.intake-*"))
        return True
    finally:
        shutil.rmtree(folder)


@settings(max_examples=40, deadline=None)
@given(SOURCES, SOURCES, PLANS)
def test_the_rows_of_hostile_bytes_add_up(
    data: bytes, held: bytes, options: dict[str, object]
) -> None:
    holds(data, held, options)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, deadline=None)
@given(SOURCES, SOURCES, PLANS)
def test_the_rows_of_many_hostile_bytes_add_up(
    data: bytes, held: bytes, options: dict[str, object]
) -> None:
    holds(data, held, options)


def test_the_seeds_reach_the_tables() -> None:
    """The control: unspoilt, the sources are read, and the law is not about nothing."""
    data = b"\n".join(SEEDS)
    assert holds(data, json.dumps(GOOD[0]).encode(), {"shape": "conversational"})
    assert n_lines(data) > 20
