"""Pairs to tokenise, and their ids by transformers itself."""

from pathlib import Path
from typing import Any

import polars as pl
from support import CHATML

from pipeline.ids import content_id
from pipeline.plan import TokenizationConfig
from pipeline.tokenization import Encoder, SequenceTables, tokenize_pairs

Pair = dict[str, Any]


def load(path: Path, template: str = CHATML) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    return tokenizer


def pair(
    prompt: str | list[dict[str, str]], chosen: str = "yes", rejected: str = "no", row: int = 0
) -> Pair:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "pair_id": content_id("pair", messages, chosen, rejected),
        "prompt": messages,
        "chosen": chosen,
        "rejected": rejected,
        "file": "f.jsonl",
        "row": row,
        "byte_offset": 10 * row,
    }


def tokenize(tokenizer: Any, *pairs: Pair, **settings: Any) -> SequenceTables:
    return tokenize_pairs(
        pl.DataFrame(list(pairs)), Encoder(tokenizer, TokenizationConfig(**settings))
    )


def sides(tables: SequenceTables, number: int = 0) -> tuple[Pair, Pair]:
    """The chosen and the rejected sequence of a pair, by its place in the table."""
    way = tables.pair_sequences.row(number, named=True)
    chosen, rejected = (
        tables.sequences.row(by_predicate=pl.col("sequence_id") == way[f"{side}_id"], named=True)
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def rendered(tokenizer: Any, pair: Pair, side: str) -> tuple[str, str]:
    """Prompt and whole conversation as transformers renders them."""
    reply = {"role": "assistant", "content": pair[side]}
    return (
        tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template([*pair["prompt"], reply], tokenize=False),
    )


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


CONVERSATION = [
    {"role": "system", "content": "be brief 😀"},
    {"role": "user", "content": "what is the answer?\n"},
    {"role": "assistant", "content": "it depends"},
    {"role": "user", "content": "on what?"},
]
PAIRS = [
    pair("the question", "the answer", "that"),
    pair("the question", "the answer", "it depends on\u2028what was asked", row=1),
    pair(CONVERSATION, " leading space", "\n\nleading newlines", row=2),
    pair("é" * 30, "\0", "😀" * 10, row=3),
]
