"""Tables of any size: in pieces, in batches, with prompts shared; and labels beside pairs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import templates
from support import tokenized as prepare
from tokens import CONVERSATION, PAIRS, load, pair, sides, tokenize

from pipeline.ids import content_id
from pipeline.plan import TokenizationConfig
from pipeline.stages import tokenize as tokenize_stage
from pipeline.store import Store, publish, publish_pieces, read, read_pieces
from pipeline.tokenization import (
    Encoder,
    label_ways,
    pair_ways,
    sorted_rows,
    tokenize_labels,
    tokenize_pairs,
)
from pipeline.tokenization import sorting as sorting_module
from pipeline.tokenization import tables as tables_module
from pipeline.tokenization.ahead import ahead
from schemas import (
    LabelSequence,
    Sequence,
    UntokenizedLabel,
    polars_schema,
)


def many(n: int = 300) -> pl.DataFrame:
    """Pairs of all kinds, some lost, some under one prompt, some with a reply in common."""
    made = []
    for number, (messages, (a, b)) in enumerate(templates.conversations(n, seed=3)):
        made.append(pair(messages, a, b, row=number))
        if number % 3 == 0:
            made.append(pair(messages, a, f"{b} or not", row=number))
    return pl.DataFrame(made).unique("pair_id", maintain_order=True)


def test_the_size_of_a_batch_changes_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(tokenizer, TokenizationConfig(max_length=1000))
    frame = many()
    expected = tokenize_pairs(frame, encoder)
    assert expected.pair_sequences.height > 100
    assert expected.untokenized["rule"].n_unique() > 1, "some are lost, and for several reasons"
    one_by_one = [tokenize_pairs(frame[i], encoder) for i in range(frame.height)]
    for name in ("pair_sequences", "untokenized"):
        parts = pl.concat([getattr(one, name) for one in one_by_one]).sort("pair_id")
        assert parts.equals(getattr(expected, name))
    monkeypatch.setattr(tables_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(tables_module, "_BATCH_CHARACTERS", 5000)
    shuffled = frame.sample(fraction=1, shuffle=True, seed=1)
    again = tokenize_pairs(shuffled, encoder)
    for name in ("sequences", "pair_sequences", "untokenized"):
        assert getattr(again, name).equals(getattr(expected, name))


def test_batches_have_so_many_rows_and_so_much_text_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables_module, "_BATCH_ROWS", 10)
    monkeypatch.setattr(tables_module, "_BATCH_CHARACTERS", 2000)
    sizes = [1, 5, 1990, 5000, 1, 1, 999, 999, 999, *[1] * 25]
    frame = pl.DataFrame([pair("q", "é" * (size // 2 + 1), "n", row=size) for size in sizes])
    parts = list(tables_module._batches(frame, tables_module.PAIRS))
    assert pl.concat(parts).equals(frame)
    for part in parts:
        n_bytes = sum(len((p + c + r).encode()) for p, c, r in _texts(part))
        assert part.height <= 10
        assert n_bytes <= 2000 or part.height == 1
    assert len(parts) < 12
    assert list(tables_module._batches(frame.clear(), tables_module.PAIRS)) == []


def _texts(part: pl.DataFrame) -> Iterator[tuple[str, str, str]]:
    for row in part.iter_rows(named=True):
        yield row["prompt"][0]["content"], row["chosen"], row["rejected"]


def test_a_prompt_is_rendered_once_for_all_its_pairs(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(tokenizer, TokenizationConfig())
    asked: list[Any] = []
    render = encoder.renderer.render

    def noted(batch: list[Any]) -> Any:
        asked.extend(batch)
        return render(batch)

    monkeypatch.setattr(encoder.renderer, "render", noted)
    ranked = [pair("q", a, b) for a in "abcd" for b in "abcd" if a < b]
    tables = tokenize_pairs(pl.DataFrame([*ranked, pair("r")]), encoder)
    assert tables.pair_sequences.height == 7
    assert [(m[0]["content"], r) for m, r in asked] == [("q", list("abcd")), ("r", ["yes", "no"])]
    expected = [tokenize(tokenizer, one).sequences for one in [*ranked, pair("r")]]
    assert tables.sequences.equals(pl.concat(expected).unique("sequence_id").sort("sequence_id"))


def test_of_equal_sequences_the_whole_one_is_kept(tiny_model: Path) -> None:
    """One reply is cut to what another one is: the same ids, once, whichever comes first."""
    plain = load(tiny_model, "{% for m in messages %}{{ m.content }}{% endfor %}")
    whole, cut = pair("q", "the answer", "no"), pair("q", "the answer depends", "that")
    chosen, _ = sides(tokenize(plain, whole))
    length = chosen["n_prompt"] + chosen["n_scored"]
    settings: dict[str, Any] = {"max_length": length, "over_long": "keep_start"}
    alone = tokenize(plain, cut, **settings).sequences.filter("truncated")
    assert alone.height == 1
    for rows in ([whole, cut], [cut, whole]):
        found = tokenize(plain, *rows, **settings).sequences
        assert found.height == 3
        assert not found["truncated"].any()
        assert alone["sequence_id"].item() in set(found["sequence_id"])


# Sorting


def rows_of(n: int, seed: int = 0) -> pl.DataFrame:
    draw = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "key": [f"{k:032x}" for k in draw.integers(0, 1 << 62, n)],
            "ids": [draw.integers(0, 9, draw.integers(0, 50)) for _ in range(n)],
            "place": range(n),
        },
        schema={"key": pl.String, "ids": pl.List(pl.Int32), "place": pl.Int64},
    ).with_columns(pl.col("key").str.reverse())


@pytest.mark.parametrize("held", [1, 20_000, 1 << 30])
def test_rows_come_back_sorted_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(sorting_module, "_HELD_BYTES", held)
    rows = rows_of(3000)
    later = rows.with_columns(pl.col("place") + 10_000)  # the same keys again
    with sorted_rows(rows.schema, tmp_path / "new", ["key", "place"]) as sorter:
        for part in (*rows.iter_slices(130), *later.iter_slices(500)):
            sorter.add(part)
        pieces = list(sorter.pieces())
        assert (len(pieces) > 10) == (held < 1 << 30)
        assert list((tmp_path / "new").iterdir()) == [], "no file that could be left behind"
    assert pl.concat(pieces).equals(rows.sort("key")), "the first of two is kept"


def test_no_rows_are_one_empty_piece(tmp_path: Path) -> None:
    with sorted_rows(rows_of(0).schema, tmp_path, ["key"]) as sorter:
        assert [piece.height for piece in sorter.pieces()] == [0]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """800 MB of rows go through; a process of its own, since a peak is a process's."""
    import subprocess
    import sys

    code = (
        "import sys, numpy as np, polars as pl\n"
        "from pathlib import Path\n"
        "from pipeline.tokenization import sorted_rows\n"
        "schema = pl.Schema({'key': pl.String, 'ids': pl.List(pl.Int32)})\n"
        "draw, n = np.random.default_rng(0), 0\n"
        "ids = pl.Series('ids', [list(range(1000))] * 1000, dtype=pl.List(pl.Int32))\n"
        "with sorted_rows(schema, Path(sys.argv[1]), ['key']) as rows:\n"
        "    for _ in range(200):\n"
        "        keys = [f'{k:016x}'[::-1] for k in draw.integers(0, 1 << 62, 1000)]\n"
        "        rows.add(pl.DataFrame({'key': keys, 'ids': ids}))\n"
        "    for piece in rows.pieces():\n"
        "        n += piece.height\n"
        "status = Path('/proc/self/status').read_text().split('VmHWM:')[1]\n"
        "print(n, int(status.split()[0]) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    n, peak = map(int, done.stdout.split())
    assert n == 200_000
    assert peak < 900, "800 MB of ids and 200 MB of libraries, were they held"


# The store


def test_pieces_are_published_and_read_in_pieces(tokenizer: Any, store: Store) -> None:
    table = tokenize_pairs(many(), Encoder(tokenizer, TokenizationConfig())).sequences
    whole = publish(store, "sequences", table, Sequence)
    pieces = publish_pieces(store, "sequences", table.iter_slices(37), Sequence)
    assert (pieces.digest, pieces.n_rows) == (whole.digest, table.height)
    found = list(read_pieces(store, "sequences", n_rows=50))
    assert max(piece.height for piece in found) <= 50
    assert pl.concat(found).equals(table)
    ids = list(read_pieces(store, "sequences", columns=["sequence_id"], n_rows=50))
    assert pl.concat(ids).equals(table.select("sequence_id"))


# Labels


def label(prompt: str | list[dict[str, str]], completion: str, row: int = 0) -> dict[str, Any]:
    messages = pair(prompt)["prompt"]
    return {
        "label_id": content_id("label", messages, completion),
        "prompt": messages,
        "completion": completion,
        "desirable": row % 2 == 0,
        "file": "f.jsonl",
        "row": row,
        "byte_offset": None,
    }


LABELS = [
    label("the question", "the answer", 0),
    label("the question", "that <|im_end|>", 1),
    label(CONVERSATION, "x" * 3000, 2),
]


def test_labels_are_tokenised_as_pairs_are(tokenizer: Any, store: Store) -> None:
    encoder = Encoder(tokenizer, TokenizationConfig())
    tables = tokenize_labels(pl.DataFrame(LABELS, infer_schema_length=None), encoder)
    pairs = tokenize_pairs(
        pl.DataFrame([pair("the question", "the answer", "that <|im_end|>")]), encoder
    )
    assert tables.sequences.equals(pairs.sequences)
    ways = {way["label_id"]: way for way in tables.label_sequences.iter_rows(named=True)}
    way = pairs.pair_sequences.row(0, named=True)
    assert ways[LABELS[0]["label_id"]]["sequence_id"] == way["chosen_id"]
    assert ways[LABELS[1]["label_id"]]["sequence_id"] == way["rejected_id"]
    assert [ways[one["label_id"]]["control_tokens"] for one in LABELS[:2]] == [0, 1]
    (lost,) = tables.untokenized.rows(named=True)
    assert (lost["label_id"], lost["rule"], lost["row"]) == (LABELS[2]["label_id"], "over_long", 2)
    assert "completion: " in lost["detail"]
    for name, frame, model in (
        ("label_sequences", tables.label_sequences, LabelSequence),
        ("untokenized_labels", tables.untokenized, UntokenizedLabel),
    ):
        publish(store, name, frame, model)
        assert read(store, name).equals(frame)


def test_pairs_and_labels_share_their_sequences(tokenizer: Any, tmp_path: Path) -> None:
    encoder = Encoder(tokenizer, TokenizationConfig())
    pairs, labels = (pl.DataFrame(rows, infer_schema_length=None) for rows in (PAIRS, LABELS))
    with sorted_rows(polars_schema(Sequence), tmp_path) as rows:
        of_pairs = pair_ways(iter([pairs]), encoder, rows.add)
        of_labels = label_ways(iter([labels]), encoder, rows.add)
        found = pl.concat(rows.pieces())
    alone, beside = tokenize_pairs(pairs, encoder), tokenize_labels(labels, encoder)
    everything = pl.concat([alone.sequences, beside.sequences])
    assert found.equals(everything.unique("sequence_id").sort("sequence_id"))
    assert found.height == everything.height - 1, "'the answer' is in both"
    assert of_pairs.ways.equals(alone.pair_sequences)
    assert of_labels.ways.equals(beside.label_sequences)


# The stage


def test_the_stage_publishes_what_the_library_says(write_plan: Any) -> None:
    path = write_plan()
    plan, store = prepare(path)
    again = tokenize_stage(plan, store)
    tokenizer = load(Path(plan.models["base"].checkpoint))
    expected = tokenize_pairs(read(store, "pairs"), Encoder(tokenizer, plan.tokenization))
    assert read(store, "sequences").equals(expected.sequences)
    assert read(store, "pair_sequences").equals(expected.pair_sequences)
    assert again.n_pairs == expected.pair_sequences.height + expected.untokenized.height == 12
    lengths = expected.sequences["n_prompt"] + expected.sequences["n_scored"]
    assert again.n_tokens == lengths.sum()
    limited, store = prepare(path, "limit_pairs=5")
    assert read(store, "pair_sequences").height == 5
    assert set(read(store, "pair_sequences")["pair_id"]) <= set(expected.pair_sequences["pair_id"])
    assert limited.limit_pairs == 5


# Working ahead


def test_items_come_in_order_and_errors_where_they_are() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    with ahead(items()) as found:
        assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="the sixth"):
            next(found)


def test_what_is_left_is_not_made() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with ahead(items(), most=2) as found:
        assert next(found) == 0
    assert len(made) <= 5


def test_a_failure_in_the_middle_ends_the_threads(tokenizer: Any) -> None:
    import threading

    encoder = Encoder(tokenizer, TokenizationConfig())

    def frames() -> Iterator[pl.DataFrame]:
        yield pl.DataFrame(PAIRS)
        raise OSError("the disk")

    before = threading.active_count()
    with pytest.raises(OSError, match="the disk"):
        pair_ways(frames(), encoder, lambda frame: None)
    assert threading.active_count() == before
    assert tokenize_pairs(pl.DataFrame(PAIRS), encoder).pair_sequences.height == len(PAIRS)
