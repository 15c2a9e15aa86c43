"""Rules over the pairs of a prompt and over splits, their switches, counts and limits."""

import json
import random
from typing import Any

import numpy as np
import polars as pl
import pytest
from desk import Desk, Row, lines, row
from pydantic import ValidationError
from support import PROJECT

from pipeline.intake.prompts.merge import _in_cycle
from pipeline.intake.prompts.near import (
    NearIndex,
    band_keys,
    jaccard,
    shares_grams,
    shingles,
    word_grams,
)
from pipeline.intake.rows.units import unit_frame
from pipeline.rules import ACTIONS, INTAKE, RULES, rules_page
from pipeline.sources import Candidate, ReadOptions, Unit, pair
from pipeline.sources.base import Message
from pipeline.store import read

ALL_TRAIN = {"test_share": 0.0}


def labelled(prompt: str, completion: str, label: bool, **more: Any) -> Row:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def rules_of(desk: Desk) -> list[tuple[Any, ...]]:
    return desk.ask("select source, row, unit, rule, rule_version from quarantine order by all")


# The registry


def test_the_page_of_rules_is_up_to_date() -> None:
    assert (PROJECT / "docs" / "rules.md").read_text() == rules_page()


def test_every_pathology_has_a_rule() -> None:
    assert {rule.pathology for rule in RULES.values()} == set(range(1, 27))
    assert all(rule.default not in rule.other for rule in RULES.values())
    said = {action for rule in RULES.values() for action in (rule.default, *rule.other)}
    assert said == set(ACTIONS)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"no_such": "off"}, "there is no such rule"),
        ({"empty_reply": "flag"}, "'flag' is not one of quarantine"),
        ({"tied": {"action": "merge"}}, "'merge' is not one of quarantine_train"),
        ({"tied": {"at_most": 2}}, "less than or equal to 1"),
    ],
)
def test_a_plan_can_only_say_what_a_rule_allows(desk: Desk, rules: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        desk.plan("s", rules=rules)


# Contradictions, ties, cycles


def test_contradictions_are_quarantined_in_both_directions(desk: Desk) -> None:
    desk.write("a.jsonl", lines(row("q", "a", "b"), row("q", "a", "c"), row("q", "a", "b")))
    desk.write("b.jsonl", lines(row("q", "b", "a"), row("other", "b", "a")))
    result = desk.run("a", "b")
    expected = [("a", 0), ("a", 2), ("b", 0)]
    assert rules_of(desk) == [(*place, 0, "contradicted", 1) for place in expected]
    assert desk.ask("select prompt[1].content, chosen, rejected from pairs order by all") == [
        ("other", "b", "a"),
        ("q", "a", "c"),
    ]
    assert result.law["holds"].all()
    desk.run("a", "b", rules={"contradicted": False})  # YAML's reading of `off`
    assert desk.ask("select count(*), sum(len(flags)) from pairs") == [(4, 0)]


def scored(prompt: str, a: float, b: float) -> Row:
    return row(prompt, f"{prompt} yes", f"{prompt} no", score_chosen=a, score_rejected=b)


def test_a_tie_is_not_trained_on_but_evaluated(desk: Desk) -> None:
    rows = [scored(f"q{i}", 3, 3) for i in range(40)] + [
        scored("more", 4, 3),
        row("none", "a", "b"),
    ]
    desk.write("s.jsonl", lines(*rows))
    result = desk.run("s", split={"test_share": 0.5})
    kept = desk.ask("select split, flags, count(*) from pairs group by all order by all")
    (_, _, n_test), *_ = [entry for entry in kept if entry[1] == ["tied"]]
    assert {(split, tuple(flags)) for split, flags, _ in kept} >= {("test", ("tied",))}
    assert ("train", ["tied"]) not in [entry[:2] for entry in kept]
    assert result.quarantined_by_rule == {"tied": 40 - n_test}
    assert 10 < n_test < 30
    flagged = desk.run("s", rules={"tied": "flag"})
    assert flagged.flags == {"tied": 40}
    assert flagged.quarantined_by_rule == {}
    everywhere = desk.run("s", rules={"tied": "quarantine"})
    assert everywhere.quarantined_by_rule == {"tied": 40}


def test_scores_survive_and_make_the_strength(desk: Desk) -> None:
    desk.write("s.jsonl", lines(scored("q", 4.5, 3), scored("r", 1, 3)))
    result = desk.run("s")
    assert result.quarantined_by_rule == {"score_contradicts_label": 1}
    ((strength, meta),) = desk.ask("select strength, meta from pairs")
    assert strength == 1.5
    assert json.loads(meta) == {"chosen_score": 4.5, "rejected_score": 3.0}
    assert desk.run("s", rules={"score_contradicts_label": "flag"}).flags == {
        "score_contradicts_label": 1
    }


def test_a_cycle_is_found_and_a_chain_is_not(desk: Desk) -> None:
    ring = [row("ring", a, b) for a, b in ("xy", "yz", "zw", "wx", "xv")]
    chain = [row("chain", a, b) for a, b in ("xy", "yz", "xz")]
    desk.write("s.jsonl", lines(*ring, *chain))
    result = desk.run("s")
    found = desk.ask(
        "select prompt[1].content, chosen, rejected from pairs "
        "where list_contains(flags, 'preference_cycle') order by all"
    )
    assert found == [("ring", *edge) for edge in ("wx", "xy", "yz", "zw")]
    assert result.flags == {"preference_cycle": 4}


@pytest.mark.parametrize("seed", range(20))
def test_cycles_are_those_that_a_search_finds(seed: int) -> None:
    """Against reachability by plain search, on random graphs of several prompts."""
    r = random.Random(seed)
    edges = {(p, *r.sample(range(7), 2)) for p in range(4) for _ in range(r.randint(1, 12))}
    edges -= {(p, b, a) for p, a, b in edges}
    ordered = sorted(edges)
    place = {"source": "s", "file": "f", "row": 0, "evaluation": False, "unit": 0}
    units = unit_frame(
        ({**place, "ordinal": i}, Unit([{"role": "user", "content": f"{p}"}], f"{a}", f"{b}"))
        for i, (p, a, b) in enumerate(ordered)
    )

    def reaches(p: int, start: int, goal: int) -> bool:
        seen, todo = {start}, [start]
        while todo:
            here = todo.pop()
            for q, a, b in edges:
                if q == p and a == here and b not in seen:
                    seen.add(b)
                    todo.append(b)
        return goal in seen

    expected = [reaches(p, b, a) for p, a, b in ordered]
    assert _in_cycle(units).tolist() == expected


# Rivals in rows of their own, labels


def test_rivals_in_different_rows_become_pairs(desk: Desk) -> None:
    def rated(prompt: str, response: str, helpfulness: int) -> Row:
        rest = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **rest}

    rows = [
        rated("q", "fair", 2), rated("q", "best", 4), rated("alone", "x", 3), rated("q", "bad", 1),
        rated("tie", "a", 3), rated("tie", "b", 3),
    ]  # fmt: skip
    desk.write("s.jsonl", lines(*rows))
    helpsteer = {"s": {"path": desk.folder / "s.jsonl", "shape": "helpsteer"}}
    result = desk.run(sources=helpsteer, split=ALL_TRAIN)
    assert desk.ask("select chosen, rejected, strength from pairs") == [("best", "bad", 3.0)]
    fates = desk.ask("select row, disposition, n_units, pair_id is null from rows order by row")
    assert fates == [
        (0, "quarantined", 0, True),
        (1, "accepted", 1, False),
        (2, "quarantined", 0, True),
        (3, "accepted", 0, False),
        (4, "quarantined", 0, True),
        (5, "quarantined", 0, True),
    ]
    assert [(r, rule) for _, r, _, rule, _ in rules_of(desk)] == [
        (0, "not_paired"), (2, "no_rival"), (4, "tied"), (5, "not_paired"),
    ]  # fmt: skip
    assert result.law.rows() == [("s", 6, 2, 0, 4, True)]
    every = {"s": {**helpsteer["s"], "pairing": "all"}}
    result = desk.run(sources=every, split=ALL_TRAIN)
    assert desk.ask("select chosen, rejected from pairs order by all") == [
        ("best", "bad"), ("best", "fair"), ("fair", "bad"),
    ]  # fmt: skip
    assert result.law["holds"].all()


@pytest.mark.parametrize(("n", "n_pairs"), [(200, 19_900), (201, 0)])
def test_a_list_of_a_million_pairs_is_refused(n: int, n_pairs: int) -> None:
    prompt: list[Message] = [{"role": "user", "content": "q"}]
    found = pair([Candidate(prompt, f"{i}", i) for i in range(n)], ReadOptions("all"))
    assert sum(isinstance(unit, Unit) for unit in found) == n_pairs
    assert len(pair([Candidate(prompt, f"{i}", i) for i in range(n)], ReadOptions())) == 1


def test_labels_are_a_table_of_their_own(desk: Desk) -> None:
    rows = [
        labelled("q", "good", True, note="n"),
        labelled("q", "good", True),
        labelled("q", "both", True),
        labelled("q", "both", False),
        labelled("q", " ", False),
        labelled("r", "bad", False),
    ]
    desk.write("s.jsonl", lines(*rows))
    desk.write("pairs.jsonl", lines(row("q", "a", "b")))
    sources = {
        "s": {"path": desk.folder / "s.jsonl"},
        "pairs": {"path": desk.folder / "pairs.jsonl"},
    }
    result = desk.run(sources=sources)
    labels = read(desk.store, "labels").sort("completion")
    assert labels.select("completion", "desirable", "votes", "meta").rows() == [
        ("bad", False, 1, "{}"),
        ("good", True, 2, '{"note": "n"}'),
    ]
    assert [(r, rule) for _, r, _, rule, _ in rules_of(desk)] == [
        (2, "contradicted"), (3, "contradicted"), (4, "empty_reply"),
    ]  # fmt: skip
    assert result.law.rows() == [("s", 6, 2, 1, 3, True), ("pairs", 1, 1, 0, 0, True)]
    assert desk.ask("select count(*) from rows where label_id is not null") == [(3,)]
    # One prompt, one split, whatever table it stands in.
    both = {t: read(desk.store, t).select("prompt_id", "split") for t in ("pairs", "labels")}
    joined = both["pairs"].join(both["labels"], on="prompt_id")
    assert joined.height == 1
    assert joined["split"][0] == joined["split_right"][0]


# Leakage

HELD = "Please explain how the lighthouse keeper repaired the broken lamp during the long storm"
NEAR = HELD.replace("lamp", "lamps").upper() + "  "
FAR = "Please tell me why the orchard keeper painted the old fence before the first snow came"


def test_prompts_near_an_evaluation_are_left_out_of_training(desk: Desk) -> None:
    desk.write("s.jsonl", lines(row(NEAR, "a", "b"), row(FAR, "a", "b"), row(HELD, "c", "d")))
    desk.write("held.jsonl", lines(row(HELD, "a", "b")))
    result = desk.run("s", evaluation=("held",), split=ALL_TRAIN)
    by_prompt = dict(desk.ask("select prompt[1].content, split from pairs"))
    assert by_prompt == {NEAR: "left_out", FAR: "train", HELD: "evaluation"}
    assert result.flags == {"near_eval": 1}
    assert result.trained_near_eval == 0
    # The controls: without the rule it is trained on, and as a flag that is counted.
    assert desk.run("s", evaluation=("held",), split=ALL_TRAIN, rules={"near_eval": "off"}) \
        .pairs_by_split == {"evaluation": 2, "train": 2}  # fmt: skip
    flagged = desk.run("s", evaluation=("held",), split=ALL_TRAIN, rules={"near_eval": "flag"})
    assert flagged.trained_near_eval == 1
    quarantined = desk.run(
        "s", evaluation=("held",), split=ALL_TRAIN, rules={"near_eval": "quarantine"}
    )
    assert quarantined.quarantined_by_rule == {"near_eval": 1}


def test_a_shared_system_message_does_not_make_prompts_near(desk: Desk) -> None:
    system = {"role": "system", "content": "You are a most helpful assistant. " * 20}

    def under(prompt: str) -> Row:
        plain = row(prompt, "a", "b")
        return {**plain, "prompt": [system, *plain["prompt"]]}

    desk.write("s.jsonl", lines(under(FAR)))
    desk.write("held.jsonl", lines(under(HELD)))
    desk.run("s", evaluation=("held",), split=ALL_TRAIN)
    assert sorted(desk.ask("select split from pairs")) == [("evaluation",), ("train",)]


def test_held_out_prompts_count_as_evaluation(desk: Desk) -> None:
    rows = [row(f"{HELD} {i % 3}{'!' * i}", f"yes {i}", f"no {i}") for i in range(30)]
    desk.write("s.jsonl", lines(*rows))
    result = desk.run("s", split={"test_share": 0.3})
    assert result.pairs_by_split.keys() == {"test", "left_out"}


def test_near_texts_are_those_an_exact_search_finds() -> None:
    r = random.Random(0)
    words = [f"w{i}{'abcdefgh'[i % 8]}" for i in range(300)]
    held = [" ".join(r.choices(words, k=25)) for _ in range(60)]
    asked = []
    for text in held:
        for n_changed in (0, 1, 2, 4, 8):
            changed = text.split()
            for place in r.sample(range(25), n_changed):
                changed[place] = r.choice(words)
            asked.append(" ".join(changed))
    index = NearIndex(pl.Series(held), band_keys(held))
    found = index.near(pl.Series(asked), band_keys(asked))
    sets = [shingles(text) for text in held]
    best = np.array([max(jaccard(shingles(text), s) for s in sets) for text in asked])
    near = best >= 0.8
    assert not (found & ~near).any()  # what is found is near
    assert 60 < near.sum() < 240
    assert (found & near).sum() >= 0.97 * near.sum()  # at 0.8 itself one in twenty is missed
    assert found[best >= 0.9].all()


def test_runs_of_words_are_found_wherever_they_stand(desk: Desk) -> None:
    run = "seven grey herons stood still beside the frozen lake at dawn"
    held = np.unique(word_grams(f"It is said that {run}, and why?"))
    assert shares_grams(f"Then, {run.upper()}!", held)
    assert not shares_grams(" ".join(reversed(run.split())), held)
    assert not shares_grams(" ".join(run.split()[:9]), held)
    assert len(word_grams(run)) == 2

    desk.write("s.jsonl", lines(row("q", f"Once {run} there.", "b"), row("r", "a", "b")))
    desk.write("held.jsonl", lines(row(f"It is said that {run}, and why?", "a", "b")))
    result = desk.run("s", evaluation=("held",), split=ALL_TRAIN)
    assert desk.ask("select prompt[1].content, split from pairs where len(flags) > 0") == [
        ("q", "train")
    ]
    assert result.flags == {"contaminated": 1}
    left = desk.run("s", evaluation=("held",), split=ALL_TRAIN, rules={"contaminated": "leave_out"})
    assert left.pairs_by_split == {"evaluation": 1, "left_out": 1, "train": 1}


# Counts and limits


def test_every_rule_is_counted_and_can_be_limited(desk: Desk) -> None:
    rows = [row(f"q{i}", "a", "b") for i in range(7)]
    desk.write("s.jsonl", b"\xef\xbb\xbf" + lines(*rows, rows[0], row("z", "same", "same"), b"bad"))
    limits = {"invalid_json": {"at_most": 0.1}, "identical_replies": {"at_most": 0.05}}
    result = desk.run("s", rules=limits)
    counted = {r["rule"]: r for r in read(desk.store, "rule_counts/intake").to_dicts()}
    n = {rule: entry["n"] for rule, entry in counted.items() if entry["n"]}
    assert n == {
        "invalid_json": 1, "identical_replies": 1, "duplicate": 1, "byte_order_mark": 1,
    }  # fmt: skip
    assert counted["invalid_json"]["share"] == pytest.approx(0.1)
    assert result.rules.filter(~pl.col("holds"))["rule"].to_list() == ["identical_replies"]
    assert counted.keys() == {rule.name for rule in RULES.values() if rule.stage in INTAKE}


def test_examples_are_the_first_five_of_each_rule(desk: Desk) -> None:
    desk.write("s.jsonl", lines(*[b"bad"] * 9, row("q", "a", "b"), row("z", "s", "s")))
    result = desk.run("s")
    assert result.examples.select("row", "rule").rows() == [
        *((i, "invalid_json") for i in range(5)), (10, "identical_replies"),
    ]  # fmt: skip


def test_confounds_are_what_duckdb_counts(desk: Desk) -> None:
    r = random.Random(1)

    def text() -> str:
        parts = [
            "word",
            "- item\n",
            "1. one\n",
            "# Head\n",
            "**b**",
            "7",
            "?",
            "!",
            "\n",
            "```x```",
        ]
        return "".join(r.choices(parts, k=r.randint(1, 12))) + str(r.random())

    rows = [row(f"q{i}", text(), text()) for i in range(300)]
    rows += [row(f"no {i}", "Sure.", "I'm sorry, I can't help with that.") for i in range(50)]
    desk.write("s.jsonl", lines(*rows))
    result = desk.run("s", rules={"near_eval": "off"})
    found = {f: (more, less, auc) for f, _, more, less, auc in result.confounds.iter_rows()}
    n = desk.ask("select count(*) from pairs")[0][0]
    counted = {
        "characters": "length(%s)",
        "lines": "length(%s) - length(replace(%s, chr(10), ''))",
        "digits": "length(regexp_replace(%s, '[^0-9]', '', 'g'))",
        "question_marks": "length(regexp_replace(%s, '[^?]', '', 'g'))",
        "exclamation_marks": "length(regexp_replace(%s, '[^!]', '', 'g'))",
        "list_items": r"len(regexp_extract_all(%s, '(?m)^\s*([-*•]|\d+[.)])\s'))",
        "markdown": r"len(regexp_extract_all(%s, '(?m)^#{1,6}\s|\*\*|```'))",
        "refusal": "contains(%s, 'sorry')::int",
    }
    assert found.keys() == counted.keys()
    for feature, sql in counted.items():
        a, b = (sql.replace("%s", side) for side in ("chosen", "rejected"))
        ((more, less),) = desk.ask(
            f"select count(*) filter ({a} > {b}), count(*) filter ({a} < {b}) from pairs"
        )
        assert found[feature][:2] == (more, less), feature
        assert found[feature][2] == pytest.approx((more + (n - more - less) / 2) / n)
    assert found["refusal"] == (0, 50, pytest.approx(0.5 - 25 / n))
    assert found["digits"][0] > 0
