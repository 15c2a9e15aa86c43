"""Conversations of any number, put together from the sentences of the embedded sample."""

import json
import random
import re
from pathlib import Path
from typing import Any

from pipeline.ids import content_id

SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "preferences.jsonl"


def conversations(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` distinct pairs in TRL's conversational shape, with about the lengths of HH-RLHF's.

    One to four turns of the user, one to four sentences a message; every other pair shares its
    prompt with the one before it. The words and their frequencies are the sample's.
    """
    draw = random.Random(seed)
    rows = [json.loads(line) for line in SAMPLE.open(encoding="utf-8")]
    asked = [m["content"] for row in rows for m in row["prompt"] if m["role"] == "user"]
    said = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    sentences = [s for text in asked + said for s in re.split(r"(?<=[.!?])\s+", text) if s]

    def message(role: str, mark: str) -> dict[str, str]:
        words = " ".join(draw.choices(sentences, k=draw.randint(1, 4)))
        return {"role": role, "content": f"{words} ({mark})"}

    made: list[dict[str, Any]] = []
    for number in range(n):
        if number % 2 and draw.random() < 0.5:
            prompt = made[-1]["prompt"]
        else:
            turns = draw.randint(1, 4)
            roles = ["user", "assistant"] * (turns - 1) + ["user"]
            prompt = [message(role, f"{number}") for role in roles]
        sides = ("chosen", "rejected")
        pair = {side: [message("assistant", f"{number} {side[0]}")] for side in sides}
        made.append({"prompt": prompt, **pair})
    return made


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of `pairs` that tokenisation reads."""
    pairs = []
    for number, row in enumerate(rows):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        pairs.append(
            {
                "pair_id": content_id("pair", row["prompt"], chosen, rejected),
                "prompt": row["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "file": "generated",
                "row": number,
                "byte_offset": 0,
            }
        )
    return pairs
