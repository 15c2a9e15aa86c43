"""What SQL selects and weighs, against DuckDB; what it cannot."""

import json
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from report_tables import frame, ident, reward_row

from pipeline.errors import TrainingError
from pipeline.plan import Selection, Sql
from pipeline.training.data.selection import select_pairs
from schemas import PairSequence, PreferencePair, Reward, Sequence

N = 90


@pytest.fixture(scope="module")
def tables() -> dict[str, pl.DataFrame]:
    """Pairs of all splits under thirty prompts, their sequences, and rewards of two policies."""
    rng = np.random.default_rng(11)
    pairs, ways, sequences = [], [], []
    for i in range(N):
        pairs.append(
            {
                "pair_id": ident("pair", i),
                "prompt_id": ident("prompt", i % 30),
                "sources": [["web"], ["books"], ["web", "books"]][i % 3],
                "split": ["train", "train", "test", "train", "left_out"][i % 5],
                "prompt": [{"role": "user", "content": f"question {i % 30}"}],
                "chosen": f"yes {i}",
                "rejected": f"no {i}",
                "strength": None if i % 7 == 0 else float(rng.normal(2, 1)),
                "votes": int(rng.integers(1, 4)),
                "flags": [[], ["mojibake"], ["cut_off", "mojibake"]][int(rng.integers(3))],
                "meta": json.dumps({"category": "even" if i % 2 == 0 else "odd"}),
                "file": f"{'ab'[i % 2]}.jsonl",
                "row": i,
                "byte_offset": None if i % 4 == 0 else 10 * i,
            }
        )
        ids = [ident(side, i) for side in ("chosen", "rejected")]
        ways.append(
            {
                "tokenization_id": ident("tokenization"),
                "pair_id": ident("pair", i),
                "chosen_id": ids[0],
                "rejected_id": ids[1],
                "boundary_merge": i % 11 == 0,
                "control_tokens": i % 3,
            }
        )
        sequences += [
            {
                "sequence_id": sequence,
                "prompt_ids": [1] * (5 + i % 30),
                "completion_ids": [2],
                "spans": [{"start": 0, "end": 1}],
                "n_prompt": 5 + i % 30,
                "n_scored": int(rng.integers(1, 40)),
                "truncated": False,
            }
            for sequence in ids
        ]
    rewards = {
        policy: frame(
            Reward,
            [
                reward_row(i, "train", *rng.normal(0, 6, 2).tolist())
                for i in range(N)
                if i % every == 0
            ],
        ).with_columns(prompt_id=pl.lit(ident("of the reward")))
        for policy, every in (("theirs", 2), ("dpo", 1))
    }
    lost = ident("pair", 3)  # valid, and not tokenised
    return {
        "pairs": frame(PreferencePair, pairs),
        "pair_sequences": frame(PairSequence, ways).filter(pl.col("pair_id") != lost),
        "sequences": frame(Sequence, sequences),
        **rewards,
    }


def selected(tables: dict[str, pl.DataFrame], where: str | None, weight: str | None = None) -> Any:
    return select_pairs(
        Selection(
            None if where is None else Sql("training.where", where),
            None if weight is None else Sql("training.weight", weight),
        ),
        tables["pairs"],
        tables["pair_sequences"],
        tables["sequences"],
        {name: tables[name] for name in ("theirs", "dpo")},
    )


def by_duckdb(tables: dict[str, pl.DataFrame], expression: str, keep: str = "TRUE") -> list[Any]:
    """Rows of (pair, value of an expression) of the training pairs that were tokenised."""
    with duckdb.connect() as connection:
        for name, table in tables.items():
            connection.register(name, table.to_arrow())
        return connection.execute(
            f"""
            WITH pairs AS (
                SELECT p.*, w.boundary_merge, w.control_tokens, c.n_prompt,
                    c.n_scored AS n_chosen, r.n_scored AS n_rejected, theirs, dpo
                FROM pairs p JOIN pair_sequences w ON p.pair_id = w.pair_id
                JOIN sequences c ON w.chosen_id = c.sequence_id
                JOIN sequences r ON w.rejected_id = r.sequence_id
                LEFT JOIN theirs ON theirs.pair_id = p.pair_id
                LEFT JOIN dpo ON dpo.pair_id = p.pair_id
                WHERE p.split = 'train'
            ), judged AS (SELECT *, ({keep}) AS kept FROM pairs)
            SELECT pair_id, ({expression}) AS value FROM judged WHERE kept ORDER BY pair_id
            """
        ).fetchall()


CONDITIONS = [
    "strength > 2",
    "strength IS NULL OR strength BETWEEN 1.5 AND 2.5",
    "votes >= 2",
    "votes % 2 = 1 AND NOT votes = 3",
    "NOT array_contains(flags, 'mojibake')",
    "array_contains(flags, 'cut_off') OR array_contains(sources, 'books')",
    "array_length(sources) = 2",
    "file = 'a.jsonl' AND row < 60",
    "file LIKE 'b%'",
    "meta LIKE '%\"even\"%'",
    "byte_offset IS NULL",
    "byte_offset + 1 > 300",
    "n_chosen < n_rejected",
    "n_prompt + n_chosen <= 40",
    "n_chosen * 1.0 / n_rejected > 0.8",
    "boundary_merge",
    "control_tokens IN (0, 2)",
    "LENGTH(chosen) > 5",
    "theirs.margin > -0.2",
    "NOT theirs.margin > -0.2",
    "theirs.margin IS NULL",
    "COALESCE(theirs.margin, 0) >= 0",
    "theirs.correct = 1.0 OR strength > 2",
    "theirs.logratio_chosen > dpo.logratio_chosen",
    "dpo.gradient_weight < 0.6 AND ABS(dpo.margin) > 0.3",
    "CASE WHEN votes > 1 THEN theirs.margin > 0 ELSE TRUE END",
    "ROW_NUMBER() OVER (PARTITION BY prompt_id ORDER BY dpo.margin DESC) = 1",
    "strength > 2 -- a comment",
]


@pytest.mark.parametrize("where", CONDITIONS)
def test_what_is_selected_is_what_duckdb_selects(
    tables: dict[str, pl.DataFrame], where: str
) -> None:
    found = selected(tables, where)
    values = dict(by_duckdb(tables, f"\n{where}\n"))
    assert found.pair_ids == [pair for pair, value in values.items() if value]
    record = found.record
    assert record.n == len(values)
    assert record.n_selected == len(found.pair_ids)
    assert record.n_left_out == sum(value is False for value in values.values())
    assert record.n_null == sum(value is None for value in values.values())
    # Controls: the condition tells pairs apart, and is not its own opposite.
    assert 0 < record.n_selected < record.n
    assert selected(tables, f"NOT (\n{where}\n)").pair_ids != found.pair_ids


@pytest.mark.parametrize(
    "weight",
    [
        "2",
        "COALESCE(strength * strength, 1.0) + 0.5",
        "votes",
        "CASE WHEN theirs.margin < 0 THEN 0.25 ELSE 2 END",
        "1 / COUNT(*) OVER (PARTITION BY prompt_id)",
        "EXP(dpo.margin)",
        "n_chosen + n_rejected",
    ],
)
@pytest.mark.parametrize("where", ["TRUE", "votes >= 2"])
def test_weights_are_what_duckdb_gives_the_selected_pairs(
    tables: dict[str, pl.DataFrame], where: str, weight: str
) -> None:
    found = selected(tables, where, weight)
    expected = by_duckdb(tables, weight, keep=where)
    assert list(found.weights) == found.pair_ids == [pair for pair, _ in expected]
    values = [float(value) for _, value in expected]
    assert list(found.weights.values()) == pytest.approx(values, rel=1e-14)
    assert found.record.lightest == min(found.weights.values())
    assert found.record.heaviest == max(found.weights.values())
    if "OVER" in weight and where != "TRUE":
        every = dict(by_duckdb(tables, weight))
        assert any(every[pair] != value for pair, value in expected), "control: WHERE comes first"


def test_where_polars_is_not_sql_is_known(tables: dict[str, pl.DataFrame]) -> None:
    """What docs/selection.md warns of; when Polars mends it, the page can be shorter."""
    condition = "(theirs.margin < 0) IS NOT TRUE"
    theirs = selected(tables, condition)
    sql = {pair for pair, value in by_duckdb(tables, condition) if value}
    assert theirs.record.n_null > 0
    assert sql - set(theirs.pair_ids)
    as_it_says = "NOT COALESCE(theirs.margin < 0, FALSE)"
    assert set(selected(tables, as_it_says).pair_ids) == sql
    thirds = selected(tables, None, "1.0 / CAST(3 AS INT)").weights.values()
    assert set(thirds) == {0.3333333}, "a literal with a point is a decimal of seven digits"
    assert set(selected(tables, None, "1 / 3").weights.values()) == {1 / 3}


def test_why_pairs_are_neither_is_counted(tables: dict[str, pl.DataFrame]) -> None:
    record = selected(tables, "theirs.margin > -0.2 AND strength > -9").record
    train = tables["pairs"].join(tables["pair_sequences"], on="pair_id").filter(split="train")
    unrewarded = train.join(tables["theirs"], on="pair_id", how="anti")
    # Where the margin is too low, the strength does not matter.
    low = tables["theirs"].filter(pl.col("margin") <= -0.2)["pair_id"]
    odd = train.filter(pl.col("strength").is_null() & ~pl.col("pair_id").is_in(low.to_list()))
    assert record.null_in == {"strength": odd.height, "theirs": unrewarded.height}
    assert 0 < odd.height < unrewarded.height < record.n
    assert f"{unrewarded.height} without theirs" in str(record)
    assert selected(tables, "dpo.margin > 0").record.null_in == {}


@pytest.mark.parametrize(
    ("where", "weight", "said"),
    [
        ("strength > 1e9", None, r"training\.where: selects nothing: 0 of \d+ pairs, \d+ left"),
        (None, "strength", r"training\.weight: is NULL for pair [0-9a-f]{32}, one of \d+"),
        (None, "votes - 2", r"training\.weight: is (-1|0)\.0 for pair .* no number above 0"),
        (None, "1 / (control_tokens - 1)", r"training\.weight: is (-1\.0|inf) for pair"),
        (None, "1.0 / (control_tokens - 1)", r"training\.weight: division by zero"),
        (None, "SQRT(control_tokens - 1)", r"training\.weight: is (nan|0\.0) for pair"),
        ("CAST(chosen AS INT) > 0", None, r"training\.where: .*conversion"),
        ("TRUE) AS value FROM pairs UNION ALL SELECT pair_id, (FALSE", None, r"where: gives \d+ v"),
    ],
)
def test_values_that_are_no_selection_are_refused(
    tables: dict[str, pl.DataFrame], where: str | None, weight: str | None, said: str
) -> None:
    with pytest.raises(TrainingError, match=said):
        selected(tables, where, weight)
