"""The report: numbers against DuckDB, hostile texts against an HTML parser, bytes against bytes."""

import hashlib
import json
import math
import unicodedata
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import duckdb
import html5lib
import matplotlib
import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.report import ReportError, ReportInput, render, report_json, report_numbers
from pipeline.report.figures import MAX_POINTS, thinned
from pipeline.report.histogram import MAX_BINS, margin_histogram
from pipeline.report.text import visible
from schemas import (
    InputRow,
    PreferencePair,
    QuarantinedRow,
    Reward,
    Table,
    TrainingStep,
    UntokenizedPair,
    polars_schema,
)

BETA, FLOOR = 0.1, 2e-4
CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
FRAMES = [f.name for f in fields(ReportInput) if f.type is pl.DataFrame]


def ident(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def frame(model: type[Table], rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=polars_schema(model), orient="row")


def reward_row(i: int, split: str, chosen: float, rejected: float) -> dict[str, Any]:
    """A row of `rewards` from its two log-ratios, nats."""
    margin = BETA * chosen - BETA * rejected
    return {
        **{name: ident(name) for name in ("policy_id", "policy_model_id", "reference_model_id")},
        "numerics_id": ident("numerics"),
        "pairs_digest": "d",
        "pair_id": ident("pair", i),
        "prompt_id": ident("prompt", i if i % 9 else 0),
        "split": split,
        "sources": ["web"],
        "n_chosen": 5 + 7 * i % 23,
        "n_rejected": 5 + 11 * i % 23,
        "ref_chosen": -50.0,
        "ref_rejected": -60.0,
        "policy_chosen": -50.0 + chosen,
        "policy_rejected": -60.0 + rejected,
        "logratio_chosen": chosen,
        "logratio_rejected": rejected,
        "beta": BETA,
        "reward_chosen": BETA * chosen,
        "reward_rejected": BETA * rejected,
        "objective_score_chosen": BETA * chosen,
        "objective_score_rejected": BETA * rejected,
        "margin": margin,
        "correct": 0.5 if margin == 0 else float(margin > 0),
        "gradient_weight": 1 / (1 + math.exp(margin)),
    }


def made(n: int = 90, text: str = "", splits: tuple[str, ...] = ("train", "test")) -> ReportInput:
    """n pairs, one tie in seven, and a row of every fate; `text` goes into every text field.

    In field f the text stands as «f:text», so that it can be looked for.
    """

    def put(field: str, default: str) -> str:
        return f"«{field}:{text}»" if text else default

    rng = np.random.default_rng(5)
    moved = rng.normal((1.0, -4.0), 6.0, (n, 2)).tolist()
    fate = {"source": put("source", "web"), "file": put("file", "a.jsonl"), "byte_offset": 0}
    accepted = {"disposition": "accepted", "n_units": 1, "duplicate_of": None}
    rewards, pairs, rows = [], [], []
    for i, (chosen, rejected) in enumerate(moved):
        split = splits[i % len(splits)]
        pair = ident("pair", i)
        rewards.append(reward_row(i, split, chosen, chosen if i % 7 == 0 else rejected))
        category = put("category", "abc"[i % 3])
        pairs.append(
            {
                "pair_id": pair,
                "prompt_id": ident("prompt", i if i % 9 else 0),
                "sources": [put("pair source", "web")],
                "split": split,
                "prompt": [
                    {"role": put("role", role), "content": put(role, f"question {i}")}
                    for role in ("system", "user")
                ],
                "chosen": put("chosen", f"yes {i}"),
                "rejected": put("rejected", f"no {i}"),
                "strength": None,
                "votes": 1,
                "flags": [put("flag", "near_identical")],
                "meta": json.dumps({"category": category}) if i % 4 else '{"category": 3}',
                "file": put("pair file", "a.jsonl"),
                "row": i,
                "byte_offset": i,
            }
        )
        rows.append({**fate, **accepted, "row": i, "pair_id": pair})
    lost = {"file": put("lost file", "a.jsonl"), "row": n, "byte_offset": 0}
    rule = put("rule", "empty_reply")
    reject = {**fate, "disposition": "quarantined", "n_units": 0, "pair_id": None}
    rows += [{**reject, "row": 1000 + k, "duplicate_of": None} for k in range(7)]
    rows.append({**rows[0], "row": 2000, "disposition": "merged", "duplicate_of": ident("pair", 0)})
    pairs.append({**pairs[0], "pair_id": ident("lost"), "prompt_id": ident("lost")})
    raw, detail = put("raw", "{}"), put("detail", "no reply")
    because = {"unit": 0, "detail": detail, "raw": raw}
    not_scored = {"rule": put("lost rule", "over_long"), "detail": put("lost detail", "long")}
    steps = [
        {
            **dict.fromkeys(polars_schema(TrainingStep), 0.5),
            "policy_id": ident("policy_id"),
            "step": k + 1,
            "num_tokens": 10,
            "loss": math.log(2) / (1 + k),
            "rewards/margins": 0.1 * k,
        }
        for k in range(12)
    ]
    return ReportInput(
        title=put("title", "Report"),
        plan=put("plan", "demo"),
        objective=put("objective", "dpo"),
        loss={put("loss", "loss"): put("loss value", "dpo")},
        rewards=frame(Reward, rewards),
        pairs=frame(PreferencePair, pairs),
        rows=frame(InputRow, rows),
        quarantine=frame(
            QuarantinedRow, [{**fate, **because, "row": 1000 + k, "rule": rule} for k in range(7)]
        ),
        untokenized=frame(
            UntokenizedPair,
            [{**lost, **not_scored, "tokenization_id": ident("t"), "pair_id": ident("lost")}],
        ),
        training_steps=frame(TrainingStep, steps),
        provenance={put("key", "seed"): put("value", "0")},
        noise_floor=FLOOR,
    )


def sql(query: str) -> list[tuple[Any, ...]]:
    relation = duckdb.sql(query)
    assert relation is not None
    return list(relation.fetchall())


def parsed(html: str) -> Element:
    root: Element = html5lib.parse(html, namespaceHTMLElements=False)
    return root


def plain(element: Element) -> str:
    return "".join(element.itertext())


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
    assert pairs["by_split"] == {"train": 46, "test": 45, "evaluation": 0}
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
    assert len(FRAMES) == 6
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
    assert len(figures) == 4
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


# Hostile text: what is in the data, and how the page must show it.
HOSTILE = [
    *(
        (text, text)
        for text in (
            "<script>alert(1)</script>",
            "</script><script>alert(1)</script>",
            "<!--<script",
            "--><b>x</b><!--",
            "<img src=x onerror=alert(1)>",
            "<svg/onload=alert(1)>",
            "<svg><script href='data:,alert(1)'/></svg>",
            "<a href='javascript:alert(1)'>x</a>",
            "javascript:alert(1)",
            "<iframe src='https://evil.example'></iframe>",
            "<link rel=stylesheet href=//evil.example/x.css>",
            "<meta http-equiv=refresh content='0;url=//evil.example'>",
            "<base href='https://evil.example/'>",
            "<form action='https://evil.example'><input></form>",
            "<object data='x'></object><embed src='x'>",
            "<style>*{display:none}</style>",
            "</style><script>alert(1)</script>",
            "</div></section></main></body></html>",
            "</title><script>alert(1)</script>",
            "</textarea><plaintext>",
            '" onmouseover="alert(1)" x="',
            "' onfocus='alert(1)' autofocus='",
            "{{ 7*7 }} {{ config }}",
            "{% for x in range(9) %}x{% endfor %}",
            "{# gone #}",
            "&lt;b&gt; &amp; &#60;script&#62; &nbsp",
            "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
            '=HYPERLINK("http://evil.example")',
            "[x](javascript:alert(1)) ![y](http://evil.example/z.png)",
            "]]><![CDATA[ <b>",
            "url(http://evil.example) expression(alert(1))",
            "العربية עברית 日本語 👩‍👩‍👧 é",
        )
    ),
    ("\x1b[31mred\x1b[0m", "[U+001B][31mred[U+001B][0m"),
    ("a\u202egnp.exe\u202c", "a[U+202E]gnp.exe[U+202C]"),
    ("\u2066x\u2069\u200f\u061c", "[U+2066]x[U+2069][U+200F][U+061C]"),
    ("a\u2028b\u2029c", "a[U+2028]b[U+2029]c"),
    ("nul\x00bel\x07del\x7fc1\x9b", "nul[U+0000]bel[U+0007]del[U+007F]c1[U+009B]"),
    ("\ufeff\U000e0041\ufffe", "[U+FEFF][U+E0041][U+FFFE]"),
    ("cr\rx", "cr[U+000D]x"),
    ("x" * 1_000_000, "x" * 100),
]
FIELDS = """title,plan,objective,loss,loss value,source,file,category,pair source,role,system,user,
chosen,rejected,flag,pair file,lost file,rule,raw,detail,lost rule,lost detail,key,value"""
ELEMENTS = """html head meta title style body bdi header h1 h2 h3 h4 h5 p b ul li span nav a main
section div table caption thead tbody tfoot tr th td code figure figcaption details summary article
strong dl dt dd"""
SVG = "svg g path defs use text clipPath rect"


@pytest.mark.parametrize(("text", "shown"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_does_nothing(text: str, shown: str) -> None:
    rendered = render(made(n=12, text=text, splits=("test",)))
    page = parsed(rendered.html)
    known = {*ELEMENTS.split(), *(f"{{http://www.w3.org/2000/svg}}{tag}" for tag in SVG.split())}
    assert {e.tag for e in page.iter()} <= known
    assert len(list(page.iter("style"))) == 1
    for element in page.iter():
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on")
            assert "//" not in value
            assert "script" not in value.lower()
            if name.endswith(("href", "src", "action", "data")):
                assert value.startswith("#")
            assert value.replace("url(#", "").count("url(") == 0
    everything = plain(page)
    for field in FIELDS.replace("\n", "").split(","):
        # Of a long prompt the page shows the end.
        cut = len(text) > 1200 and field in {"system", "user"}
        assert (f"{shown}»" if cut else f"«{field}:{shown}") in everything, field
    assert len(rendered.html) < 3_000_000
    json.loads(rendered.json, parse_constant=pytest.fail)


def test_page_has_no_comment_or_processing_instruction() -> None:
    assert "<!--" not in render(made(text="<!-- x --><?php ?>")).html


@given(st.text())
def test_visible_text_holds_nothing_that_controls(text: str) -> None:
    found = visible(text)
    for character in found:
        assert character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cs"}
        assert unicodedata.bidirectional(character) not in set(
            ["LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"]
        )
    if text.isascii() and text.isprintable():
        assert found == text


def test_json_is_deterministic_and_refuses_nan() -> None:
    assert report_json({"b": 1, "a": 2.5}) == report_json({"a": 2.5, "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        report_json({"a": math.nan})
