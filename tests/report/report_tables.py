"""The tables of a small report, with a row of every fate, and a parsed page."""

import hashlib
import json
import math
from dataclasses import fields
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import numpy as np
import polars as pl

from pipeline.report import ReportInput
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
            QuarantinedRow,
            [
                {**fate, **because, "row": 1000 + k, "rule": rule, "rule_version": 1}
                for k in range(7)
            ],
        ),
        untokenized=frame(
            UntokenizedPair,
            [{**lost, **not_scored, "tokenization_id": ident("t"), "pair_id": ident("lost")}],
        ),
        training_steps=frame(TrainingStep, steps),
        training_pairs=frame(PreferencePair, pairs).filter(split="train"),
        provenance={put("key", "seed"): put("value", "0")},
        noise_floor=FLOOR,
    )


def parsed(html: str) -> Element:
    root: Element = html5lib.parse(html, namespaceHTMLElements=False)
    return root


def plain(element: Element) -> str:
    return "".join(element.itertext())
