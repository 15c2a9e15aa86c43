"""The embedded sample is what its data card says, and words alone do not give its labels away."""

import difflib
import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
from support import PROJECT, measured

from pipeline.intake import run_intake
from pipeline.models import Checkpoint, load_tokenizer
from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.report.baselines import classifier_scores
from pipeline.store import read

ROWS = [
    json.loads(line)
    for line in (PROJECT / "sample" / "preferences.jsonl").read_text("utf-8").splitlines()
]
CARD = (PROJECT / "sample" / "README.md").read_text("utf-8")


def replies(row: dict[str, list[dict[str, str]]]) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_it_is_as_large_and_as_varied_as_the_card_says() -> None:
    assert len(ROWS) >= 240
    categories = Counter(row["category"] for row in ROWS)
    assert len(categories) >= 8
    assert min(categories.values()) >= 20
    longer = Counter(row["category"] for row in ROWS if len(replies(row)[0]) > len(replies(row)[1]))
    flaws = Counter(row["flaw"] for row in ROWS)
    for name, n in categories.items():
        (line,) = [x for x in CARD.splitlines() if x.startswith(f"| {name}")]
        assert line.endswith(f"| {n} | {longer[name]} |")
    for name, n in flaws.items():
        (line,) = [x for x in CARD.splitlines() if x.startswith(f"| `{name}`:")]
        assert line.endswith(f"| {n} |")
    strength = Counter(row["strength"] for row in ROWS)
    said = f"Strength: {strength[3]} pairs at 3, {strength[2]} at 2, {strength[1]} at 1."
    assert said in CARD
    assert 0.45 <= sum(longer.values()) / len(ROWS) <= 0.55


def test_no_two_prompts_or_replies_are_alike() -> None:
    prompts = [row["prompt"][-1]["content"] for row in ROWS]
    assert len({json.dumps(row["prompt"]) for row in ROWS}) == len(ROWS)
    texts = [text for row in ROWS for text in replies(row)]
    assert len(set(texts)) == len(texts)
    alike = [
        (a, b)
        for a, b in combinations(prompts, 2)
        if (matcher := difflib.SequenceMatcher(None, a, b)).real_quick_ratio() > 0.75
        and matcher.quick_ratio() > 0.75
        and matcher.ratio() > 0.75
    ]
    assert alike == []


def test_the_demo_holds_enough_of_it_out_and_loses_nothing(
    packaged_model: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(packaged_model)
    lengths = [len(tokenizer(text)["input_ids"]) for row in ROWS for text in replies(row)]
    assert median(lengths) <= 50
    plan = load_plan(PROJECT / "plans" / "demo.yaml", [f"store={tmp_path}"], environment={})
    store = store_of(plan)
    run_intake(plan, store)
    pairs = read(store, "pairs")
    assert read(store, "quarantine").is_empty()
    assert pairs.height == len(ROWS)
    assert (pairs["flags"].list.len() == 0).all()
    assert pairs.filter(split="test").height >= 80
    held_out = pairs.filter(split="test")
    scores = classifier_scores(pairs.filter(split="train"), held_out)
    accuracy = float(np.mean(scores > 0))
    measured(f"TF-IDF + logistic: {accuracy:.3f} of {held_out.height} held-out pairs")
    assert accuracy <= 0.70
    # The control: a word that only chosen replies hold would be found.
    marked = pairs.with_columns(pl.concat_str(pl.lit("indeed "), "chosen").alias("chosen"))
    found = classifier_scores(marked.filter(split="train"), marked.filter(split="test"))
    assert float(np.mean(found > 0)) > 0.95
