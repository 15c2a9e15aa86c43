"""The intake's sources: folders, what cannot be read, their digest, and real pathologies."""

import gzip
import os

import pytest
from desk import GOOD, Desk, lines, row

from pipeline.errors import SourceError
from pipeline.intake import run_intake, sources_digest
from pipeline.store import read


def test_a_folder_is_read_in_order_of_name(desk: Desk) -> None:
    desk.write("s/b.jsonl", lines(row("b", "x", "y")))
    desk.write("s/a.jsonl.gz", gzip.compress(lines(b"bad", row("a", "x", "y"))))
    desk.write("s/deep/c.ndjson", lines(row("c", "x", "y"), row("b", "x", "y")))
    desk.write("s/notes.txt", b"not data")
    result = desk.run("s")
    assert read(desk.store, "rows").select("file", "row", "disposition").rows() == [
        ("a.jsonl.gz", 0, "quarantined"),
        ("a.jsonl.gz", 1, "accepted"),
        ("b.jsonl", 0, "accepted"),
        ("deep/c.ndjson", 0, "accepted"),
        ("deep/c.ndjson", 1, "merged"),
    ]
    assert desk.ask("select file, row, byte_offset from quarantine") == [("a.jsonl.gz", 0, 0)]
    assert result.law.rows() == [("s", 5, 3, 1, 1, True)]


def test_a_source_that_cannot_be_read_is_named(desk: Desk) -> None:
    plan = desk.plan("none")
    with pytest.raises(SourceError, match=r"source 'none': .*none\.jsonl: no such file or folder"):
        run_intake(plan, desk.store)
    with pytest.raises(SourceError, match="source 'none'"):
        sources_digest(plan)
    desk.write("empty/notes.txt", b"")
    with pytest.raises(SourceError, match=r"no file ends in \.jsonl"):
        desk.run("empty")
    desk.write("cut.jsonl", gzip.compress(lines(*GOOD))[:-4])
    with pytest.raises(SourceError, match=r"cut\.jsonl: cannot be read"):
        desk.run("cut")
    assert not desk.store.directory.exists()


def test_a_file_name_no_table_can_hold_is_refused(desk: Desk) -> None:
    folder = desk.folder / "s"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.jsonl")).write_bytes(lines(*GOOD))
    with pytest.raises(SourceError, match="name is not UTF-8"):
        desk.run("s")
    with pytest.raises(SourceError, match="name is not UTF-8"):
        sources_digest(desk.plan("s"))


@pytest.mark.parametrize(
    ("data", "rules"),
    [
        (b"", {}),
        (b"\n\n", {}),
        (lines(b"bad", b"[]", row("q", "same", "same")),
         {"invalid_json": 1, "not_an_object": 1, "identical_replies": 1}),
    ],
)  # fmt: skip
def test_no_valid_pair_is_an_error_that_leaves_the_quarantine(
    desk: Desk, data: bytes, rules: dict[str, int]
) -> None:
    desk.write("s.jsonl", data)
    with pytest.raises(SourceError, match="no valid pair in s") as caught:
        desk.run("s")
    path = desk.store.current("quarantine").resolve()
    assert str(path) in str(caught.value)
    assert dict(desk.ask("select rule, count(*) from quarantine group by all")) == rules
    assert all(f"'{rule}': {count}" in str(caught.value) for rule, count in rules.items())
    assert desk.ask("select count(*) from rows") == [(sum(rules.values()),)]


def test_one_good_source_carries_an_empty_one(desk: Desk) -> None:
    desk.write("s.jsonl", lines(*GOOD))
    desk.write("empty.jsonl", b"")
    assert desk.run("empty", "s").law.rows() == [
        ("empty", 0, 0, 0, 0, True),
        ("s", 5, 5, 0, 0, True),
    ]


def test_the_sources_digest_is_that_of_the_bytes(desk: Desk) -> None:
    path = desk.write("s.jsonl", lines(*GOOD))
    plan = desk.plan("s")
    digest = sources_digest(plan)
    os.utime(path, (0, 0))
    assert sources_digest(plan) == digest
    path.write_bytes(lines(*GOOD, GOOD[0]))
    assert sources_digest(plan) != digest
    path.write_bytes(lines(*GOOD))
    assert sources_digest(plan) == digest
    shape = plan.sources["s"].model_copy(update={"shape": "hh"})
    assert sources_digest(plan.model_copy(update={"sources": {"s": shape}})) != digest
    assert sources_digest(plan.model_copy(update={"evaluation": {"e": shape}})) != digest


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


HOW = ("Human: How do I boil an egg?", "Assistant: In water.", "Human: How long?")
HI = ("Human: Hi",)
HH_ROWS: list[tuple[str, str, str | None]] = [
    # What is wrong with real HH-RLHF rows, made by hand; None: accepted.
    (transcript(*HOW, "Assistant: Seven."), transcript(*HOW, "Assistant: I don't know."), None),
    (transcript(*HI, "Assistant: Hello!"), transcript(*HI, "Assistant: What?"), None),
    (transcript(*HOW, "Assistant: Six."), transcript(*HOW, "Assistant:"), "empty_reply"),
    (transcript(*HOW, "Assistant: \n "), transcript(*HOW, "Assistant: Six."), "empty_reply"),
    (transcript(*HI, "Assistant: Yo."), transcript(*HI, "Assistant:  Yo. "), "identical_replies"),
    (
        transcript(*HI, "Assistant: Yes?", "Human: Bye", "Assistant: Bye."),
        transcript(*HI, "Assistant: No.", "Human: Bye", "Assistant: Bye!"),
        "prompts_differ",
    ),
    (
        transcript(*HI, "Assistant: Yes?", "Human: Bye", "Assistant: Bye."),
        transcript(*HI, "Assistant: Yes!"),
        "prompts_differ",
    ),
    (transcript(*HOW), transcript(*HOW, "Assistant: Six."), "no_reply"),
    (transcript("Human:"), transcript("Human:"), "no_reply"),
    ("Assistant: Six.", transcript(*HOW, "Assistant: Six."), "not_a_transcript"),
    (
        transcript("Human: Who?", "Human: Hello?", "Assistant: Me.\n\nNobody else."),
        transcript("Human: Who?", "Human: Hello?", "Assistant: You."),
        None,
    ),
    (
        transcript("Assistant: How can I help?", "Human: Sing", "Assistant: La"),
        transcript("Assistant: How can I help?", "Human: Sing", "Assistant: No"),
        None,
    ),
    (
        transcript("Human: Go on", "Assistant: First.", "Assistant: Second."),
        transcript("Human: Go on", "Assistant: First.", "Assistant: Stop."),
        None,
    ),
]


def test_the_pathologies_of_hh(desk: Desk) -> None:
    desk.write("hh.jsonl", lines(*[{"chosen": c, "rejected": r} for c, r, _ in HH_ROWS]))
    result = desk.run("hh")
    assert desk.ask("select row, rule from quarantine order by row") == [
        (i, rule) for i, (_, _, rule) in enumerate(HH_ROWS) if rule
    ]
    accepted = desk.ask(
        "select row, list_transform(prompt, lambda m: m.role[1]), chosen, flags from pairs "
        "order by row"
    )
    assert accepted == [
        (0, ["u", "a", "u"], "Seven.", []),
        (1, ["u"], "Hello!", []),
        (10, ["u", "u"], "Me.\n\nNobody else.", ["role_repeated"]),
        (11, ["a", "u"], "La", []),
        (12, ["u", "a"], "Second.", ["role_repeated"]),
    ]
    assert result.law.rows() == [("hh", 13, 5, 0, 8, True)]
