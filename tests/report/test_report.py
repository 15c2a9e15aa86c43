"""The report: numbers against DuckDB, the page by an HTML parser, bytes against bytes."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import matplotlib
import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from report_tables import BETA, FLOOR, FRAMES, frame, made, parsed, plain, reward_row

from pipeline.report import ReportError, render, report_json, report_numbers
from pipeline.report.figures import MAX_POINTS, thinned
from pipeline.report.histogram import MAX_BINS, margin_histogram
from schemas import InputRow, PreferencePair, QuarantinedRow, Reward, TrainingStep, UntokenizedPair

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def sql(query: str) -> list[tuple[Any, ...]]:
    relation = duckdb.sql(query)
    assert relation is not None
    return list(relation.fetchall())


# Numbers


def test_the_example_tables_are_valid() -> None:
    inp = made()
    for name, model in {
        "rewards": Reward,
        "pairs": PreferencePair,
        "rows": InputRow,
        "quarantine": QuarantinedRow,
        "untokenized": UntokenizedPair,
        "training_steps": TrainingStep,
    }.items():
        model.validate(getattr(inp, name))


@pytest.mark.parametrize("split", ["all", "train", "test", "evaluation"])
def test_split_numbers_match_duckdb(split: str, tmp_path: Path) -> None:
    inp = made(splits=("train", "test", "train", "evaluation"))
    inp.rewards.write_parquet(tmp_path / "r.parquet")
    row = sql(
        f"""
        SELECT count(*), count(DISTINCT prompt_id), sum((margin = 0)::int),
            avg(CASE WHEN margin > 0 THEN 1 WHEN margin = 0 THEN 0.5 ELSE 0 END),
            avg(CASE WHEN objective_score_chosen > objective_score_rejected THEN 1
                WHEN objective_score_chosen = objective_score_rejected THEN 0.5 ELSE 0 END),
            avg(CASE WHEN n_chosen > n_rejected THEN 1 WHEN n_chosen = n_rejected THEN 0.5
                ELSE 0 END),
            avg(margin), quantile_cont(margin, 0.5), quantile_cont(margin, 0.05),
            quantile_cont(margin, 0.95), sum((abs(margin) <= {4 * BETA * FLOOR})::int),
            avg(reward_chosen), avg(reward_rejected), avg(logratio_chosen),
            avg(logratio_rejected), avg((logratio_chosen < 0)::int), avg(n_chosen),
            avg(n_rejected)
        FROM '{tmp_path}/r.parquet' WHERE '{split}' IN ('all', split)
        """
    )[0]
    ours = dict(report_numbers(inp)["splits"][split])
    low, high = ours.pop("accuracy_low"), ours.pop("accuracy_high")
    assert list(ours.values()) == pytest.approx([float(v) for v in row], abs=1e-12)
    assert ours["n"] > 10
    assert ours["n_ties"] > 0
    assert low < ours["accuracy"] < high


def test_control_other_rewards_give_other_numbers() -> None:
    inp = made()
    swapped = inp.rewards.with_columns(-pl.col("margin"), correct=1 - pl.col("correct"))
    before = report_numbers(inp)["splits"]["test"]
    after = report_numbers(replace(inp, rewards=swapped))["splits"]["test"]
    assert after["accuracy"] == pytest.approx(1 - before["accuracy"])
    assert after["margin_mean"] == -before["margin_mean"]
    assert after["accuracy"] != before["accuracy"]


def test_rows_by_fate_match_duckdb(tmp_path: Path) -> None:
    inp = made()
    other = inp.rows.head(3).with_columns(source=pl.lit("other"))
    inp = replace(inp, rows=pl.concat([inp.rows, other]))
    inp.rows.write_parquet(tmp_path / "rows.parquet")
    fates = ("accepted", "merged", "quarantined")
    columns = ", ".join(f"count(*) FILTER (disposition = '{f}')" for f in fates)
    theirs = sql(
        f"SELECT source, count(*), {columns} FROM '{tmp_path}/rows.parquet' GROUP BY 1 ORDER BY 1"
    )
    ours = report_numbers(inp)["rows"]
    rows = [(s["source"], s["n_in"], *(s[f] for f in fates)) for s in ours["by_source"]]
    assert rows == theirs
    assert ours["total"] == {
        "n_in": 101,
        "accepted": 93,
        "merged": 1,
        "quarantined": 7,
        "law_holds": True,
    }


def test_the_row_law_can_fail() -> None:
    inp = made()
    two_fates = pl.concat([inp.rows, inp.rows.head(1).with_columns(disposition=pl.lit("merged"))])
    numbers = report_numbers(replace(inp, rows=two_fates))
    assert not numbers["rows"]["total"]["law_holds"]
    assert "do not add up" in render(replace(inp, rows=two_fates)).html
    unexplained = replace(inp, quarantine=inp.quarantine.head(4))
    assert report_numbers(unexplained)["rows"]["n_without_reason"] == 3
    assert "3 quarantined without a reason" in render(unexplained).html
    assert "all accounted for" in render(inp).html


def test_pairs_are_accounted_for() -> None:
    inp = made()
    pairs = report_numbers(inp)["pairs"]
    assert (pairs["n"], pairs["n_scored"], pairs["n_untokenized"]) == (91, 90, 1)
    assert pairs["n_unaccounted"] == 0
    assert pairs["by_split"] == {"train": 46, "test": 45, "evaluation": 0, "left_out": 0}
    lost = replace(inp, untokenized=inp.untokenized.clear())
    assert report_numbers(lost)["pairs"]["n_unaccounted"] == 1


def test_categories_match_duckdb(tmp_path: Path) -> None:
    inp = made()
    inp.rewards.write_parquet(tmp_path / "r.parquet")
    inp.pairs.write_parquet(tmp_path / "p.parquet")
    theirs = sql(
        f"""
        SELECT meta->>'$.category' AS category, count(*), avg(correct), avg(margin)
        FROM '{tmp_path}/r.parquet' r JOIN '{tmp_path}/p.parquet' p USING (pair_id)
        WHERE r.split = 'test' AND json_type(meta, '$.category') = 'VARCHAR'
        GROUP BY 1 ORDER BY 1
        """
    )
    ours = report_numbers(inp)["categories"]
    assert len(theirs) == 3
    for row, (category, n, accuracy, margin) in zip(ours["rows"], theirs, strict=True):
        assert (row["category"], row["n"]) == (category, n)
        assert (row["accuracy"], row["margin_mean"]) == pytest.approx((accuracy, margin), abs=1e-12)
    assert ours["n_without"] == 45 - sum(n for _, n, _, _ in theirs)


@pytest.mark.parametrize("meta", ["", "no json", "[1]", '{"category": 1}', "[" * 100_000])
def test_meta_without_a_category_is_not_a_category(meta: str) -> None:
    inp = made()
    numbers = report_numbers(replace(inp, pairs=inp.pairs.with_columns(meta=pl.lit(meta))))
    assert numbers["categories"] == {"rows": [], "n_without": 45}


def test_policy_that_is_the_reference() -> None:
    inp = made()
    rows = [reward_row(i, "test", 0.0, 0.0) for i in range(90)]
    rendered = render(replace(inp, rewards=frame(Reward, rows)))
    held = rendered.numbers["splits"]["test"]
    assert (held["accuracy"], held["n_ties"], held["margin_mean"]) == (0.5, 90, 0.0)
    assert held["n_within_noise"] == 90
    assert "coin toss cannot be ruled out" in rendered.html
    assert rendered.numbers["histogram"]["counts"] == {"test": [90]}


@pytest.mark.parametrize(
    ("margin", "accuracy", "floor", "start"),
    [
        (0.0, 0.5, None, "exactly"),
        (3.9 * BETA * FLOOR, 0.6, FLOOR, "within_noise"),
        (4.1 * BETA * FLOOR, 0.6, FLOOR, "no"),
        (1e-9, 0.6, None, "no"),
        (math.nan, 0.5, FLOOR, "no"),
    ],
)
def test_where_training_starts(
    margin: float, accuracy: float, floor: float | None, start: str
) -> None:
    inp = made()
    first = pl.col("step") == 1
    steps = inp.training_steps.with_columns(
        pl.when(first).then(margin).otherwise("rewards/margins").alias("rewards/margins"),
        pl.when(first).then(accuracy).otherwise("rewards/accuracies").alias("rewards/accuracies"),
    )
    training = report_numbers(replace(inp, training_steps=steps, noise_floor=floor))["training"]
    assert training["starts_at_reference"] == start
    assert training["n_nonfinite"] == int(math.isnan(margin))
    assert (training["n_steps"], training["last"]["step"]) == (12, 12)
    assert training["first"]["loss"] == math.log(2)


def test_noise_in_margins_is_four_log_probs() -> None:
    noise = report_numbers(made())["noise"]
    assert noise == {"nats": FLOOR, "margin": pytest.approx(4 * BETA * FLOOR)}
    assert report_numbers(replace(made(), noise_floor=None))["noise"]["margin"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_counted_and_left_out(value: float) -> None:
    inp = made()
    bad = pl.int_range(pl.len()) < 4
    spoilt = inp.rewards.with_columns(pl.when(bad).then(value).otherwise("margin").alias("margin"))
    rendered = render(replace(inp, rewards=spoilt))
    clean = report_numbers(replace(inp, rewards=inp.rewards.slice(4)))
    assert rendered.numbers["finite"] == {"n": 90, "n_nonfinite": 4}
    assert rendered.numbers["splits"] == clean["splits"]
    assert "4 not finite" in rendered.html
    json.loads(rendered.json, parse_constant=pytest.fail)


def test_empty_tables_make_a_report() -> None:
    inp = made()
    empty = replace(inp, noise_floor=None, **{name: getattr(inp, name).clear() for name in FRAMES})
    assert len(FRAMES) == 7
    rendered = render(empty)
    assert rendered.numbers["splits"]["all"]["accuracy"] is None
    assert rendered.numbers["training"] is None
    assert "No pair was scored" in rendered.html
    json.loads(rendered.json, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda i: replace(i, noise_floor=math.nan),
        lambda i: replace(i, noise_floor=-1.0),
        lambda i: replace(i, pairs=i.pairs.slice(1)),
        lambda i: replace(i, pairs=pl.concat([i.pairs, i.pairs.head(1)])),
        lambda i: replace(i, rewards=pl.concat([i.rewards, i.rewards.head(1)])),
        lambda i: replace(i, rewards=i.rewards.with_columns(beta=pl.col("n_chosen") * 0.1)),
        lambda i: replace(i, rewards=i.rewards.with_columns(policy_id=pl.col("pair_id"))),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(spoil: Any) -> None:
    with pytest.raises(ReportError):
        render(spoil(made()))


@example([0.0, 5e-324], [])
@example([1e15, 1e15 + 1], [])
@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.lists(st.floats(-3, 3), max_size=60))
def test_histogram_counts_every_margin(left: list[float], right: list[float]) -> None:
    samples = {"train": np.array(left), "test": np.array(right)}
    found = margin_histogram(samples)
    if not left and not right:
        assert found is None
        return
    assert found is not None
    edges = np.array(found["edges"])
    assert 1 <= len(edges) - 1 <= MAX_BINS
    assert (np.diff(edges) > 0).all()
    assert {k: sum(v) for k, v in found["counts"].items()} == {
        k: v.size for k, v in samples.items() if v.size
    }
    if len(edges) > 2 and edges[0] < 0 < edges[-1]:
        above = sum(sum(np.array(v)[edges[:-1] >= 0]) for v in found["counts"].values())
        assert above == sum(x >= 0 for x in left + right)


def test_long_training_logs_are_thinned_to_means() -> None:
    steps = pl.concat([made().training_steps] * 1000).with_columns(step=pl.int_range(1, 12_001))
    curve, every = thinned(steps)
    assert (curve.height, every) == (MAX_POINTS, 40)
    assert curve["loss"][0] == pytest.approx(steps["loss"][:40].mean())
    assert curve["step"][-1] == 12_000


# The page


def test_equal_tables_give_equal_bytes() -> None:
    inp = made()
    first = render(inp)
    shuffled = replace(
        inp,
        provenance=dict(reversed({"b": "1", "a": "2"}.items())),
        **{n: getattr(inp, n).sample(fraction=1, shuffle=True, seed=3) for n in FRAMES},
    )
    assert not shuffled.rewards.equals(inp.rewards)
    inp = replace(inp, provenance={"a": "2", "b": "1"})
    assert render(shuffled) == render(inp) != first
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.hashsalt": None}):
        assert render(inp) == render(inp)
        styled = render(inp)
    assert styled == render(inp)


def test_page_is_one_well_formed_document() -> None:
    page = parsed(render(made()).html)
    csp = [m.get("content") for m in page.iter("meta") if m.get("http-equiv")]
    assert csp == [CSP]
    assert page.get("lang") == "en"
    levels = [int(e.tag[1]) for e in page.iter() if str(e.tag) in {"h1", "h2", "h3", "h4", "h5"}]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    tables = list(page.iter("table"))
    assert len(tables) >= 7
    for table in tables:
        assert plain(next(iter(table.iter("caption")))).strip()
        assert all(cell.get("scope") in {"col", "row"} for cell in table.iter("th"))
    figures = [e for e in page.iter("div") if "plot" in (e.get("class") or "")]
    assert len(figures) == 6
    assert all(f.get("role") == "img" and f.get("aria-label") for f in figures)
    ids = [e.get("id") for e in page.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    targets = {(e.get("href") or "").lstrip("#") for e in page.iter("a")}
    assert targets
    assert targets <= set(ids)


def test_figures_follow_the_page_colours() -> None:
    rendered = render(made())
    assert "#0102" not in rendered.html  # a sentinel that was not replaced
    assert "currentColor" in rendered.html
    assert rendered.html.count("ln 2</text>") == 2
    assert rendered.histogram_png.startswith(b"\x89PNG")
    assert len(rendered.histogram_png) < 50_000
    assert b"tEXt" not in rendered.histogram_png


def test_without_held_out_pairs_the_page_says_so() -> None:
    rendered = render(made(splits=("train",)))
    assert rendered.numbers["held_out_split"] is None
    assert "No pair was held out" in rendered.html
    assert "No pair was held out" not in render(made()).html


def test_extreme_pairs_are_the_held_out_extremes() -> None:
    inp = made()
    page = parsed(render(inp).html)
    shown = [plain(p) for p in page.iter("details") if p.get("class") == "pair"]
    held = inp.rewards.filter(split="test").sort("margin", "pair_id")["pair_id"].to_list()
    assert len(shown) == 20
    for text, pair in zip(shown, [*held[:10], *reversed(held[-10:])], strict=True):
        assert pair in text
        index = inp.pairs["pair_id"].to_list().index(pair)
        assert inp.pairs["chosen"][index] in text
        assert inp.pairs["prompt"][index][-1]["content"] in text


def test_no_page_grows_without_bound() -> None:
    text = "\u202e&\"'<" * 4000
    inp = made(text=text)
    n = 300
    rules = pl.Series([f"{text[:2000]}{k}" for k in range(n)])
    quarantine = pl.concat([inp.quarantine] * 43)[:n].with_columns(rule=rules, source=rules)
    rows = pl.concat([inp.rows] * 4)[:n].with_columns(source=rules)
    provenance = {f"{k}{text[:2000]}": text for k in range(n)}
    rendered = render(replace(inp, quarantine=quarantine, rows=rows, provenance=provenance))
    assert len(rendered.html.encode()) <= 3_000_000
    assert "characters shown" in rendered.html


def test_json_is_deterministic_and_refuses_nan() -> None:
    assert report_json({"b": 1, "a": 2.5}) == report_json({"a": 2.5, "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        report_json({"a": math.nan})
