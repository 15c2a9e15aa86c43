"""The intake: every row that was read is accounted for, and nobody moves between splits."""

import json
import random
from collections import Counter
from dataclasses import replace

import polars as pl
import pytest
from desk import GOOD, Desk, Row, lines, row

from pipeline import intake
from pipeline.intake import run
from pipeline.intake.law import count_fates, row_law
from pipeline.intake.prompts.splits import prompts_in_two_splits, split_of
from pipeline.intake.rows import reading
from pipeline.sources import RowError
from pipeline.store import read

BAD: list[tuple[Row | bytes, str, str]] = [
    (b"{not json", "invalid_json", "char 1"),
    (b'{"chosen":"\xff"}', "invalid_utf8", "byte 11"),
    (b"[1,2]", "not_an_object", "list"),
    (b'{"chosen":1,"chosen":2}', "duplicate_key", "'chosen'"),
    (b'{"\\ud800":1,"\\ud800":2}', "duplicate_key", "\\ud800"),
    (b'{"chosen":NaN}', "nan_literal", "NaN"),
    (b'{"chosen":"\\ud800"}', "lone_surrogate", "half"),
    (b'{"chosen":' + b"[" * 990 + b"]" * 990 + b"}", "too_deep", "100"),
    (row("q", "a", "b", more=json.loads("[" * 150 + "]" * 150)), "too_deep", "100"),
    ({"chosen": GOOD[0]["chosen"]}, "missing_field", "'rejected'"),
    (row("q", "a", "b", strength="3"), "wrong_type", "'strength'"),
    (row("q", "a", "b", strength=10**400), "strength_not_finite", "float64"),
    ({"chosen": "a", "rejected": "b"}, "wrong_type", "'chosen' is a str"),
    (
        {**GOOD[0], "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "unsupported_content",
        "chosen[0].content",
    ),
    ({**GOOD[0], "chosen": [{"role": "user", "content": "x"}]}, "no_reply", "chosen"),
    (
        {**GOOD[0], "chosen": [{"role": "user", "content": "x"}, *GOOD[0]["chosen"]]},
        "prompts_differ",
        "turn 1",
    ),
    ({**GOOD[0], "prompt": []}, "empty_prompt", "empty_prompt"),
    ({**GOOD[0], "prompt": [{"role": "tool", "content": "x"}]}, "unknown_role", "unknown_role"),
    (row("q", " \n\u00a0", "b"), "empty_reply", "empty_reply"),
    (row("q", "a", ""), "empty_reply", "empty_reply"),
    (row("q", "same  text", " same\ttext\n"), "identical_replies", "identical_replies"),
    (row("q", "caf\u00e9", "cafe\u0301"), "identical_replies", "identical_replies"),
    (row("q", " ", "\n"), "empty_reply", "breaks empty_reply, identical_replies"),
    (
        {"prompt": [{"role": "x", "content": "q"}], "chosen": row("", "", "a")["chosen"],
         "rejected": row("", "", "b")["rejected"]},
        "unknown_role",
        "breaks unknown_role, empty_reply",
    ),
]  # fmt: skip


def test_every_bad_row_is_quarantined_by_its_rule_and_place(desk: Desk) -> None:
    mixed: list[Row | bytes] = []
    expected = []
    for i, (bad, rule, words) in enumerate(BAD):
        mixed += [GOOD[i % len(GOOD)], bad] if i % 2 else [bad, b" \t"]
        expected.append((mixed.index(bad, len(mixed) - 2), rule, words))
    data = lines(*mixed, *GOOD)
    desk.write("s.jsonl", data)
    result = desk.run("s")

    found = desk.ask(
        "select row, rule, byte_offset, detail, raw, source, file, unit from quarantine"
    )
    assert sorted((place, rule) for place, rule, *_ in found) == [e[:2] for e in expected]
    offsets = [0]
    for line in data.split(b"\n"):
        offsets.append(offsets[-1] + len(line) + 1)
    for (number, _, words), (place, _, offset, detail, raw, *rest) in zip(
        expected, sorted(found), strict=True
    ):
        assert words in detail
        assert (place, offset) == (number, offsets[number])
        whole = data[offset : offsets[number + 1] - 1].decode(errors="replace")
        assert raw == whole[: intake.RAW_CAP]
        assert rest == ["s", "s.jsonl", 0]

    assert result.quarantined_by_rule == dict(sorted(Counter(rule for _, rule, _ in BAD).items()))
    n_blank = sum(line == b" \t" for line in mixed)
    counts = dict(desk.ask("select disposition, count(*) from rows group by all"))
    n_good = len(mixed) - len(BAD) - n_blank + len(GOOD)
    assert counts == {"accepted": 5, "merged": n_good - 5, "quarantined": len(BAD)}
    assert result.law.rows() == [("s", len(mixed) - n_blank + 5, 5, n_good - 5, len(BAD), True)]
    assert desk.ask("select sum(votes), count(*) from pairs") == [(n_good, 5)]
    # Every input row has one fate, and the quarantined are those without a unit.
    assert desk.ask("select count(*), count(distinct (file, row)) from rows") == [
        (len(mixed) - n_blank + 5,) * 2
    ]
    assert desk.ask(
        "select count(*) from rows left join quarantine using (source, file, row, byte_offset) "
        "where (disposition = 'quarantined') != (rule is not null) "
        "or (disposition = 'quarantined') != (n_units = 0) or (pair_id is null) != (n_units = 0) "
        "or (disposition = 'merged') != (duplicate_of is not null)"
    ) == [(0,)]


def test_the_row_law_breaks_when_a_row_is_lost(desk: Desk) -> None:
    desk.write("one.jsonl", lines(*GOOD, b"bad", GOOD[0]))
    desk.write("two.jsonl", lines(GOOD[1], b"bad"))
    result = desk.run("one", "two")
    assert result.law.rows() == [("one", 7, 5, 1, 1, True), ("two", 2, 0, 1, 1, True)]
    rows, pairs = read(desk.store, "rows"), read(desk.store, "pairs")
    n_read = {"one": 7, "two": 2}

    def holds(rows: pl.DataFrame, n_read: dict[str, int], pairs: pl.DataFrame) -> list[bool]:
        return row_law(count_fates(rows), n_read, int(pairs["votes"].sum()))["holds"].to_list()

    assert holds(rows, n_read, pairs) == [True, True]
    for lost in range(rows.height):
        without = rows.filter(pl.int_range(pl.len()) != lost)
        assert not all(holds(without, n_read, pairs)), rows.row(lost, named=True)
    assert holds(rows.filter(pl.col("disposition") != "quarantined"), n_read, pairs) == [False] * 2
    assert holds(pl.concat([rows, rows[:1]]), n_read, pairs) == [False, False]
    assert holds(rows, {"one": 8, "two": 2}, pairs) == [False, True]
    assert holds(rows, {**n_read, "three": 1}, pairs) == [True, True, False]
    assert holds(rows, {**n_read, "three": 0}, pairs) == [True, True, True]
    assert holds(rows, n_read, pairs[1:]) == [False, False]  # a pair lost after merging


def test_a_reader_that_loses_rows_breaks_the_law(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.write("s.jsonl", lines(*GOOD))
    whole = reading.read_chunk

    def lossy(chunk: reading.Chunk) -> reading.ReadChunk:
        return whole(replace(chunk, rows=chunk.rows[:-1]))

    monkeypatch.setattr(run, "read_chunk", lossy)
    assert desk.run("s").law.rows() == [("s", 5, 4, 0, 0, False)]


def test_chunks_leave_no_seam(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write("s/a.jsonl", lines(*GOOD, b"bad", GOOD[0], *GOOD))
    desk.write("s/b.jsonl", lines(b"bad", *GOOD[:2], row("new", "a", "b")))
    whole = desk.run("s")
    monkeypatch.setattr(run, "_CHUNK_ROWS", 2)
    again = desk.run("s")
    assert [t.digest for t in (again.pairs, again.rows, again.quarantine)] == [
        t.digest for t in (whole.pairs, whole.rows, whole.quarantine)
    ]
    assert again.law.rows() == whole.law.rows() == [("s", 16, 6, 8, 2, True)]


def test_equal_pairs_merge_across_sources(desk: Desk) -> None:
    first = row("q", "a", "b", strength=1, by="x")
    second = row("q", "a", "b", strength=4, by="é", a=[{"c": 0, "b": 1}])
    desk.write("one.jsonl", lines(row("other", "c", "d"), first))
    desk.write("two.jsonl", lines(second, row("q", "a", "b"), row("q", "a", "B")))
    desk.run("two", "one")
    found = desk.ask(
        "select chosen, rejected, votes, sources, strength, meta, file, row from pairs order by all"
    )
    assert found == [
        ("a", "B", 1, ["two"], None, "{}", "two.jsonl", 2),
        ("a", "b", 3, ["one", "two"], 2.5, '{"a": [{"b": 1, "c": 0}], "by": "é"}', "two.jsonl", 0),
        ("c", "d", 1, ["one"], None, "{}", "one.jsonl", 0),
    ]
    ((pair_id,),) = desk.ask("select pair_id from pairs where votes = 3")
    assert desk.ask(
        "select source, row, disposition, pair_id = duplicate_of from rows "
        f"where pair_id = '{pair_id}' order by source desc, row"
    ) == [("two", 0, "accepted", None), ("two", 1, "merged", True), ("one", 1, "merged", True)]


def test_an_implicit_prompt_is_the_same_pair(desk: Desk) -> None:
    explicit = row("q", "a", "b")
    implicit = {side: explicit["prompt"] + explicit[side] for side in ("chosen", "rejected")}
    desk.write("s.jsonl", lines(explicit, implicit))
    desk.write("hh.jsonl", lines({side: f"\n\nHuman: q\n\nAssistant: {text}" for side, text in
                                  (("chosen", "a"), ("rejected", "b"))}))  # fmt: skip
    desk.run("s", "hh")
    assert desk.ask("select votes, sources from pairs") == [(3, ["hh", "s"])]


def test_what_is_unusual_is_flagged(desk: Desk) -> None:
    def turns(*roles: str) -> list[Row]:
        return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]

    desk.write(
        "one.jsonl",
        lines(
            row("one", "a", "b"),
            row("one", "b", "a"),
            row("one", "a", "c"),
            {**row("", "good", "d"), "prompt": turns("system", "user", "assistant", "user")},
            {**row("", "twice", "d"), "prompt": turns("user", "user")},
            {**row("", "before", "d"), "prompt": turns("user", "assistant")},
        ),
    )
    longer = {**row("two", "b", "a"), "prompt": turns("user", "user")}
    desk.write("two.jsonl", lines(row("two", "a", "b"), longer))
    desk.write("three.jsonl", lines(row("two", "b", "a")))
    result = desk.run("one", "two", "three", rules={"contradicted": "flag"})
    flags = desk.ask("select prompt[-1].content, chosen, rejected, flags from pairs order by all")
    assert flags == [
        ("assistant 1", "before", "d", ["role_repeated"]),
        ("one", "a", "b", ["contradicted"]),
        ("one", "a", "c", []),
        ("one", "b", "a", ["contradicted"]),
        ("two", "a", "b", ["contradicted"]),
        ("two", "b", "a", ["contradicted"]),
        ("user 1", "b", "a", ["role_repeated"]),
        ("user 1", "twice", "d", ["role_repeated"]),
        ("user 3", "good", "d", []),
    ]
    assert result.flags == {"contradicted": 4, "role_repeated": 3}


# Splits


def splits(desk: Desk) -> dict[str, str]:
    return dict(desk.ask("select pair_id, split from pairs"))


def test_no_row_moves_when_others_come_or_go(desk: Desk) -> None:
    rows = [row(f"question {i}?", f"yes {i}", f"no {i}") for i in range(200)]
    desk.write("s.jsonl", lines(*rows))
    desk.run("s")
    everyone = splits(desk)
    assert Counter(everyone.values())["test"] == pytest.approx(40, abs=20)  # 3.5 standard errors

    order = random.Random(3)
    for _ in range(3):
        some = order.sample(rows, 90)
        desk.write("s.jsonl", lines(*some, b"bad"))
        desk.write("t.jsonl", lines(*[row(f"new {order.random()}", "a", "b") for _ in range(20)]))
        desk.run("t", "s")
        now = splits(desk)
        assert len(now) == 110
        shared = now.keys() & everyone.keys()
        assert len(shared) == 90
        assert all(now[pair_id] == everyone[pair_id] for pair_id in shared)


def test_pairs_of_one_prompt_share_a_split(desk: Desk) -> None:
    rows = [row(f"q {i // 4}", f"yes {i}", f"no {i}") for i in range(160)]
    desk.write("s.jsonl", lines(*rows))
    result = desk.run("s", split={"test_share": 0.5})
    per_prompt = "select count(distinct split), count(*) from pairs group by prompt_id"
    assert set(desk.ask(per_prompt)) == {(1, 4)}
    assert len(desk.ask(per_prompt)) == 40
    assert set(result.pairs_by_split) == {"train", "test"}
    pairs = read(desk.store, "pairs")
    assert prompts_in_two_splits(pairs) == 0
    # The control: one pair moved by hand is found.
    moved = pairs.with_columns(
        split=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("evaluation")).otherwise("split")
    )
    assert prompts_in_two_splits(moved) == 1


def test_share_and_salt_decide_the_split(desk: Desk) -> None:
    desk.write("s.jsonl", lines(*[row(f"q {i}", "yes", "no") for i in range(200)]))
    seen = {}
    for share, salt in ((0, "a"), (0.5, "a"), (0.5, "b"), (0.9, "a")):
        desk.run("s", split={"test_share": share, "salt": salt})
        seen[share, salt] = {k for k, split in splits(desk).items() if split == "test"}
    assert len(seen[0, "a"]) == 0
    assert len(seen[0.5, "a"]) == pytest.approx(100, abs=30)
    assert seen[0.5, "a"] < seen[0.9, "a"]  # a larger share only adds
    assert 60 < len(seen[0.5, "a"] ^ seen[0.5, "b"]) < 140  # another salt is another draw
    plan = desk.plan("s", split={"test_share": 0.5})
    assert {split_of(f"{i:032x}", plan.split) for i in range(50)} == {"train", "test"}


def test_evaluation_prompts_are_never_trained_on(desk: Desk) -> None:
    rows = [row(f"q {i}", f"yes {i}", f"no {i}") for i in range(60)]
    desk.write("s.jsonl", lines(*rows))
    desk.write("held.jsonl", lines(rows[0], row("q 1", "other", "reply"), row("only", "a", "b")))
    result = desk.run("s", evaluation=("held",), split={"test_share": 0.0})
    held = desk.ask(
        "select prompt[1].content, chosen, sources, votes from pairs "
        "where split = 'evaluation' order by all"
    )
    assert held == [
        ("only", "a", ["held"], 1),
        ("q 0", "yes 0", ["held", "s"], 2),
        ("q 1", "other", ["held"], 1),
        ("q 1", "yes 1", ["s"], 1),
    ]
    assert result.pairs_by_split == {"evaluation": 4, "train": 58}
    assert result.law.rows() == [("s", 60, 60, 0, 0, True), ("held", 3, 2, 1, 0, True)]


# Stability


def test_the_order_of_rows_does_not_matter(desk: Desk) -> None:
    votes = [row("q", "a", "b", strength=s) for s in (0.1, 0.2, 0.3, 0.7, 1e15)]
    rows: list[Row | bytes] = [
        *GOOD,
        *GOOD,
        *votes,
        row("q", "b", "a"),
        b"bad",
        row("z", "same", "same"),
    ]
    place = ["file", "row", "byte_offset"]
    tables = []
    for seed in range(8):
        random.Random(seed).shuffle(rows)
        desk.write("s.jsonl", lines(*rows))
        desk.run("s")
        tables.append(read(desk.store, "pairs").drop(place))
    assert tables[0].height == 5
    assert all(table.equals(tables[0]) for table in tables)


def test_the_same_input_gives_the_same_bytes(desk: Desk) -> None:
    desk.write("s.jsonl", lines(*GOOD, b"bad"))
    first, second = desk.run("s"), desk.run("s")
    assert (first.pairs, first.rows, first.quarantine) == (
        second.pairs,
        second.rows,
        second.quarantine,
    )


STRANGE = [
    "😀👩\u200d👩\u200d👧 \U0001f1e9\U0001f1ea",
    "line\nbreak\r\nand\ttab ",
    "  kept spaces  ",
    "\u2028\u2029\x85\x0b\x0c",
    "nul \0 and \x1b[31m",
    "cafe\u0301 is not caf\u00e9",
    "\u202ertl\u202c \ufeff \ue000",
    '</script><b>"quoted" \\n {{ 7 * 7 }} =SUM(1)',
    "<|im_end|>\n<|im_start|>system",
    "x" * 100_000,
]


@pytest.mark.parametrize("escaped", [False, True])
def test_text_survives_verbatim(desk: Desk, escaped: bool) -> None:
    rows = [row(text, f"a{text}", f"b{text}", note=text) for text in STRANGE]
    desk.write(
        "s.jsonl", b"".join(json.dumps(r, ensure_ascii=escaped).encode() + b"\n" for r in rows)
    )
    desk.run("s")
    pairs = read(desk.store, "pairs").sort("row")
    for text, pair in zip(STRANGE, pairs.iter_rows(named=True), strict=True):
        assert pair["prompt"] == [{"role": "user", "content": text}]
        assert (pair["chosen"], pair["rejected"]) == (f"a{text}", f"b{text}")
        assert json.loads(pair["meta"]) == {"note": text}
    found = desk.ask("select prompt[1].content, chosen from pairs order by row")
    assert found == [(text, f"a{text}") for text in STRANGE]


def test_the_quarantine_keeps_the_beginning_of_a_row(desk: Desk) -> None:
    huge = '{"x":"' + "é😀" * 50_000
    desk.write("s.jsonl", lines(huge.encode(), GOOD[0]))
    desk.run("s")
    assert desk.ask("select raw from quarantine") == [(huge[: intake.RAW_CAP],)]
    assert str(RowError("rule", "detail")) == "rule: detail"
