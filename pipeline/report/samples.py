"""The rows a reader should see with their own eyes, cut to what a page can hold."""

from typing import Any

import polars as pl

from pipeline.report.inputs import ReportInput
from pipeline.report.text import TEXT_LIMIT, count, label, number, passage

EXAMPLES = 10
SAMPLES_PER_RULE = 5
RULES_WITH_SAMPLES = 12
_EARLIER_MESSAGES = 20
_FLAGS = 12


def extremes(inp: ReportInput, split: str | None) -> dict[str, list[dict[str, Any]]]:
    """The pairs of the lowest and the highest margins, at most ten each and none in both.

    Args:
        inp: an input whose rewards are finite.
        split: which pairs; None for all.

    Returns:
        `worst`, lowest margin first, and `best`, highest first; each a view for the template.
    """
    rewards = inp.rewards if split is None else inp.rewards.filter(split=split)
    ranked = rewards.sort("margin", "pair_id").drop("sources")
    n_worst = min(EXAMPLES, (ranked.height + 1) // 2)
    n_best = min(EXAMPLES, ranked.height - n_worst)
    texts = inp.pairs.select(
        "pair_id", "prompt", "chosen", "rejected", "sources", "flags", "file", "row"
    )

    def views(part: pl.DataFrame) -> list[dict[str, Any]]:
        joined = part.join(texts, on="pair_id", how="left", maintain_order="left")
        return [_example(row) for row in joined.iter_rows(named=True)]

    return {"worst": views(ranked.head(n_worst)), "best": views(ranked.tail(n_best).reverse())}


def quarantine_samples(quarantine: pl.DataFrame, rules: list[str]) -> list[dict[str, Any]]:
    """Per rule, the first rejected rows as they were read; `rules` in the order to show."""
    return [
        {
            "rule": label(rule),
            "rows": [
                {
                    "file": label(row["file"]),
                    "row": count(row["row"]),
                    "source": label(row["source"]),
                    "detail": passage(row["detail"], limit=300),
                    "raw": passage(row["raw"]),
                }
                for row in quarantine.filter(rule=rule).head(SAMPLES_PER_RULE).to_dicts()
            ],
        }
        for rule in rules[:RULES_WITH_SAMPLES]
    ]


def untokenized_samples(
    untokenized: pl.DataFrame, pairs: pl.DataFrame, rules: list[str]
) -> list[dict[str, Any]]:
    """Per rule, the first pairs that could not be tokenised, with their chosen reply."""
    texts = pairs.select("pair_id", "chosen")
    samples = []
    for rule in rules[:RULES_WITH_SAMPLES]:
        part = untokenized.filter(rule=rule).head(SAMPLES_PER_RULE)
        joined = part.join(texts, on="pair_id", how="left", maintain_order="left")
        rows = [
            {
                "file": label(row["file"]),
                "row": count(row["row"]),
                "source": row["pair_id"],
                "detail": passage(row["detail"], limit=300),
                "raw": passage(row["chosen"] or ""),
            }
            for row in joined.to_dicts()
        ]
        samples.append({"rule": label(rule), "rows": rows})
    return samples


def _example(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["prompt"]
    earlier = messages[:-1]
    return {
        "pair_id": row["pair_id"],
        "opening": label(" ".join(messages[-1]["content"][:400].split())) if messages else "",
        "split": row["split"],
        "margin": number(row["margin"], 3, sign=True),
        "verdict": {1.0: "agrees", 0.5: "tie", 0.0: "disagrees"}[row["correct"]],
        "file": label(row["file"]),
        "row": count(row["row"]),
        "sources": [label(source) for source in row["sources"][:_FLAGS]],
        "flags": [label(flag) for flag in row["flags"][:_FLAGS]],
        "n_hidden": max(0, len(earlier) - _EARLIER_MESSAGES),
        "earlier": _messages(earlier[-_EARLIER_MESSAGES:]),
        "last": _messages(messages[-1:]),
        "sides": [
            {
                "name": side,
                "text": passage(row[side]),
                "tokens": count(row[f"n_{side}"]),
                "logratio": number(row[f"logratio_{side}"], 2, sign=True),
                "per_token": number(row[f"logratio_{side}"] / row[f"n_{side}"], 3, sign=True),
            }
            for side in ("chosen", "rejected")
        ],
    }


def _messages(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages as views; together they share one passage's length."""
    alone = len(messages) == 1
    limit = TEXT_LIMIT // max(1, len(messages))
    return [
        {"role": label(m["role"]), **passage(m["content"], keep_end=alone, limit=limit)}
        for m in messages
    ]
