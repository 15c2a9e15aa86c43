"""The baselines against other ways to the same numbers, and against labels that say nothing."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from report_tables import made
from scipy.optimize import minimize

from pipeline.report import render, report_numbers
from pipeline.report.baselines import FOLDS, baselines, classifier_scores

WORDS = [f"word{k}" for k in range(60)]


def texts(n: int, seed: int, mark: str = "") -> pl.DataFrame:
    """Pairs of random words; `mark` stands in every chosen reply."""
    draw = np.random.default_rng(seed)
    sides = [[" ".join(draw.choice(WORDS, 8)) for _ in range(n)] for _ in range(2)]
    return pl.DataFrame({"chosen": [f"{t} {mark}" for t in sides[0]], "rejected": sides[1]})


def test_the_classifier_is_the_minimum_of_its_own_objective() -> None:
    """Against scipy: TF-IDF by the textbook, and the penalised logistic loss minimised anew."""
    fit, judge = texts(12, 0), texts(5, 1)
    vocabulary: dict[str, int] = {}

    def terms(text: str) -> list[str]:
        words = text.split()
        return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]

    documents = [terms(t) for t in (*fit["chosen"], *fit["rejected"])]
    for document in documents:
        for term in document:
            vocabulary.setdefault(term, len(vocabulary))
    counts = np.zeros(len(vocabulary))
    for document in documents:
        for term in set(document):
            counts[vocabulary[term]] += 1
    idf = np.log((1 + len(documents)) / (1 + counts)) + 1

    def vector(text: str) -> np.ndarray:
        row = np.zeros(len(vocabulary))
        for term in terms(text):
            if term in vocabulary:
                row[vocabulary[term]] += 1
        row[row > 0] = 1 + np.log(row[row > 0])
        row *= idf
        norm = np.linalg.norm(row)
        return row / norm if norm else row

    def differences(frame: pl.DataFrame) -> np.ndarray:
        return np.array([vector(c) - vector(r) for c, r in frame.iter_rows()])

    seen = differences(fit)

    def objective(weights: np.ndarray) -> float:
        # Each pair both ways round, C = 1.
        return 2 * float(np.log1p(np.exp(-seen @ weights)).sum()) + 0.5 * float(weights @ weights)

    best = minimize(objective, np.zeros(len(vocabulary)), method="BFGS", options={"gtol": 1e-7}).x
    expected = differences(judge) @ best
    assert classifier_scores(fit, judge) == pytest.approx(expected, abs=1e-3)
    assert np.abs(expected).max() > 0.05


def test_a_word_that_decides_is_found_and_noise_is_not() -> None:
    fit, judge = texts(120, 2, mark="certainly"), texts(100, 3, mark="certainly")
    assert (classifier_scores(fit, judge) > 0).mean() == 1.0
    nothing = (classifier_scores(texts(120, 4), texts(400, 5)) > 0).mean()
    assert abs(nothing - 0.5) < 3 * math.sqrt(0.25 / 400)
    # Turned round, every score changes its sign: there is no intercept, and no side.
    turned = judge.select(chosen="rejected", rejected="chosen")
    assert classifier_scores(fit, turned) == pytest.approx(-classifier_scores(fit, judge))


def test_accuracies_match_duckdb(tmp_path: Path) -> None:
    inp = made()
    generator = np.random.default_rng(0)
    noise = {
        c: generator.normal(-50, 9, inp.rewards.height) for c in ("ref_chosen", "ref_rejected")
    }
    rewards = inp.rewards.with_columns(**{c: pl.Series(v) for c, v in noise.items()})
    held_out = rewards.filter(split="test")
    held_out.write_parquet(tmp_path / "r.parquet")
    (expected,) = duckdb.sql(
        f"""
        SELECT avg(CASE WHEN n_chosen > n_rejected THEN 1 WHEN n_chosen = n_rejected THEN 0.5
                ELSE 0 END),
            avg((ref_chosen > ref_rejected)::int),
            avg((ref_chosen / n_chosen > ref_rejected / n_rejected)::int)
        FROM '{tmp_path}/r.parquet'
        """
    ).fetchall()  # type: ignore[union-attr]
    numbers = report_numbers(replace(inp, rewards=rewards))["baselines"]
    found = {row["key"]: row for row in numbers["rows"]}
    keys = ["length", "reference_sum", "reference_per_token"]
    assert [found[key]["accuracy"] for key in keys] == pytest.approx(expected, abs=1e-12)
    assert found["reference_sum"]["accuracy"] != found["reference_per_token"]["accuracy"]
    split = report_numbers(replace(inp, rewards=rewards))["splits"]["test"]
    assert numbers["length_rule"] == "longer"
    assert found["length"]["accuracy"] == split["length_only_accuracy"]
    for row in found.values():
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]


def marked(training: bool, shuffled: bool = False) -> dict[str, float | int | bool]:
    """The words' accuracy where «certainly» marks the chosen reply."""
    inp = made(n=200)
    draw = np.random.default_rng(1).random(inp.pairs.height) < 0.5
    chosen = ["no" if shuffled and flip else "certainly yes" for flip in draw.tolist()]
    rejected = ["certainly yes" if shuffled and flip else "no" for flip in draw.tolist()]
    pairs = inp.pairs.with_columns(chosen=pl.Series(chosen), rejected=pl.Series(rejected))
    fitted = pairs.filter(split="train") if training else pairs.clear()
    found = baselines(inp.rewards.filter(split="test"), pairs, fitted)
    (words,) = [row for row in found["rows"] if row["key"] == "words"]
    return {**found, **words}


def test_without_training_pairs_the_classifier_is_cross_validated() -> None:
    fitted = marked(training=True)
    assert (fitted["accuracy"], fitted["cross_validated"]) == (1.0, False)
    assert fitted["n_fitted"] > 90
    crossed = marked(training=False)
    assert (crossed["accuracy"], crossed["cross_validated"]) == (1.0, True)
    assert crossed["n_fitted"] == 100
    assert abs(marked(training=False, shuffled=True)["accuracy"] - 0.5) < 0.2


def test_too_few_prompts_or_no_word_is_no_number() -> None:
    inp = made(n=2 * FOLDS)
    few = baselines(inp.rewards.filter(split="test"), inp.pairs, inp.pairs.clear())
    assert (few["n_fitted"], few["rows"][1]["accuracy"]) == (0, None)
    silent = inp.pairs.with_columns(chosen=pl.lit("?"), rejected=pl.lit("!"))
    none = baselines(inp.rewards, silent, silent.filter(split="train"))
    assert none["rows"][1]["accuracy"] is None
    page = render(replace(inp, pairs=silent, training_pairs=silent.filter(split="train")))
    assert "A classifier of the replies" not in page.html


def test_the_classifier_learns_from_the_training_pairs_alone() -> None:
    """What the training pairs prefer is what the held-out ones do not."""
    inp = made(n=200)
    train = pl.col("split") == "train"
    pairs = inp.pairs.with_columns(
        chosen=pl.when(train).then(pl.lit("no")).otherwise(pl.lit("certainly yes")),
        rejected=pl.when(train).then(pl.lit("certainly yes")).otherwise(pl.lit("no")),
    )
    found = baselines(inp.rewards.filter(split="test"), pairs, pairs.filter(train))
    assert found["rows"][1]["accuracy"] == 0.0


def test_the_rule_about_length_is_the_training_pairs() -> None:
    inp = made()
    long = pl.lit("a long reply to a question")
    texts = {"longer": {"chosen": long, "rejected": pl.lit("yes")}}
    texts["shorter"] = {"chosen": texts["longer"]["rejected"], "rejected": long}
    judged = inp.rewards.filter(split="test")
    found = {
        rule: baselines(judged, inp.pairs, inp.training_pairs.with_columns(**sides))
        for rule, sides in texts.items()
    }
    assert {rule: numbers["length_rule"] for rule, numbers in found.items()} == {
        "longer": "longer",
        "shorter": "shorter",
    }
    longer, shorter = (found[rule]["rows"][0]["accuracy"] for rule in ("longer", "shorter"))
    assert longer + shorter == pytest.approx(1.0)
    assert longer != shorter
