"""What rewards are made of: pairs, their sequences, and two models' log-probs."""

import hashlib
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline import rewards
from pipeline.losses import REGISTRY
from schemas import LogProb, PairSequence, PreferencePair, Table, polars_schema

BETA, OBJECTIVE_BETA = 0.1, 0.25


def ident(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Tables:
    pairs: pl.DataFrame
    pair_sequences: pl.DataFrame
    reference: pl.DataFrame
    policy: pl.DataFrame

    def rewards(self, **changes: object) -> pl.DataFrame:
        arguments: dict[str, Any] = {
            "pairs": self.pairs,
            "pair_sequences": self.pair_sequences,
            "reference": self.reference,
            "policy": self.policy,
            "beta": BETA,
            "spec": REGISTRY["dpo"],
            "values": {"beta": OBJECTIVE_BETA},
            "statistics": {},
            "policy_id": ident("policy"),
            "pairs_digest": "digest",
        } | changes
        return rewards.reward_table(**arguments)


def frame(model: type[Table], rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=polars_schema(model), orient="row")


def tables(n: int = 60, seed: int = 0) -> Tables:
    """n pairs in random order: every seventh a tie, every tenth prompt repeated."""
    drawn = pl.Series(range(4 * n)).shuffle(seed=seed).to_list()
    pairs: list[dict[str, Any]] = []
    ways: list[dict[str, Any]] = []
    reference: list[dict[str, Any]] = []
    policy: list[dict[str, Any]] = []
    for i in range(n):
        chosen, rejected = ident(i, "w"), ident(i, "l")
        pairs.append(
            {
                "pair_id": ident("pair", i),
                "prompt_id": ident("prompt", i if i % 10 else 0),
                "sources": ["a"],
                "split": ("train", "test", "evaluation")[i % 3],
                "prompt": [{"role": "user", "content": "?"}],
                "chosen": "c",
                "rejected": "r",
                "strength": None,
                "votes": 1,
                "flags": [],
                "meta": "{}",
                "file": "f",
                "row": i,
                "byte_offset": i,
            }
        )
        ways.append(
            {
                "tokenization_id": ident("t"),
                "pair_id": ident("pair", i),
                "chosen_id": chosen,
                "rejected_id": rejected,
                "boundary_merge": False,
                "control_tokens": 0,
            }
        )
        for k, sequence in enumerate((chosen, rejected)):
            base = -1.0 - drawn[4 * i + 2 * k] / 7
            moved = base if i % 7 == 0 else base + (drawn[4 * i + 2 * k + 1] - 2 * n) / 11
            n_tokens = 1 + (3 * i + 5 * k) % 17
            for rows, name, value in ((reference, "ref", base), (policy, "pol", moved)):
                rows.append(
                    {
                        "model_id": ident(name),
                        "numerics_id": ident("numerics", name),
                        "sequence_id": sequence,
                        "logprob": value,
                        "n_tokens": n_tokens,
                    }
                )
    made = Tables(
        frame(PreferencePair, pairs),
        frame(PairSequence, ways),
        frame(LogProb, reference),
        frame(LogProb, policy),
    )
    return Tables(
        *(
            t.sample(fraction=1, shuffle=True, seed=seed + k)
            for k, t in enumerate(vars(made).values())
        )
    )
