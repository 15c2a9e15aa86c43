"""A plan whose pairs are all scored, made without a model, and the stage that finds out."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import polars as pl

from pipeline.models import resolve
from pipeline.names import store_of
from pipeline.plan import Plan, load_plan
from pipeline.scoring.ledger import ScorerKey, append, record_trust
from pipeline.scoring.null_test import NullTest
from pipeline.scoring.run import scorer_key
from pipeline.stages import score, scored_rows
from pipeline.store import publish
from pipeline.tokenization import sequence_id
from schemas import LogProb, PairSequence, Sequence, TokenLogProb, polars_schema

COMMIT_ROWS = 64
"""As on a CPU: the more commits, the longer it takes to read them."""
PROMPT_TOKENS, REPLY_TOKENS = (20, 200), (20, 300)


@dataclass(frozen=True)
class Known:
    """One run of the scoring stage over a ledger that has everything.

    Attributes:
        seconds: of the stage and its checks, imports not counted.
        loaded_torch: whether torch was imported meanwhile.
        n_scored: sequences it scored; none are missing.
        n_held: sequences it found.
    """

    seconds: float
    loaded_torch: bool
    n_scored: int
    n_held: int


def prepare(root: Path, n_pairs: int, seed: int = 0) -> Path:
    """Publish the sequences of `n_pairs` pairs, commit log-probs of all; the plan's path."""
    checkpoint = root / "model"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(
        json.dumps({"vocab_size": 32_000, "max_position_embeddings": 4096})
    )
    # It can be told what the model is, but not loaded.
    (checkpoint / "model.safetensors").write_bytes(np.random.default_rng(seed).bytes(1 << 20))
    path = root / "plan.yaml"
    source = {"path": str(root / "pairs.jsonl"), "shape": "conversational"}
    (root / "pairs.jsonl").touch()
    said = {
        "name": "known",
        "store": str(root / "store"),
        "sources": {"pairs": source},
        "models": {"base": {"checkpoint": str(checkpoint), "engine": "torch"}},
    }
    path.write_text(json.dumps(said))  # JSON is YAML
    plan = load_plan(path)
    _publish(plan, n_pairs, seed)
    return path


def run_again(path: Path) -> Known:
    """The scoring stage of the plan's model, with what its checks read."""
    plan = load_plan(path)
    store = store_of(plan)
    torch_before = "torch" in sys.modules
    started = perf_counter()
    result = score(plan, store, "base")
    rows = scored_rows(plan, store, "base", result.key)
    seconds = perf_counter() - started
    assert not result.model_loaded
    return Known(seconds, "torch" in sys.modules and not torch_before, result.n_scored, rows.n_rows)


def _publish(plan: Plan, n_pairs: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, ways = [], []
    for pair in range(n_pairs):
        prompt = generator.integers(3, 32_000, generator.integers(*PROMPT_TOKENS)).astype(np.int32)
        ids = []
        for _ in range(2):
            reply = generator.integers(3, 32_000, generator.integers(*REPLY_TOKENS))
            reply = reply.astype(np.int32)
            ids.append(sequence_id(prompt, reply, [(0, len(reply))]))
            spans = [{"start": 0, "end": len(reply)}]
            rows.append((ids[-1], prompt, reply, spans, len(prompt), len(reply), False))
        ways.append(("0" * 32, f"{pair:032x}", *ids, False, 0))
    sequences = pl.DataFrame(
        {name: [row[i] for row in rows] for i, name in enumerate(polars_schema(Sequence))},
        schema=polars_schema(Sequence),
    ).sort("sequence_id")
    pairs = pl.DataFrame(ways, schema=polars_schema(PairSequence), orient="row")
    store = store_of(plan)
    publish(store, "sequences", sequences, Sequence)
    publish(store, "pair_sequences", pairs, PairSequence)
    config = plan.models["base"]
    key = scorer_key(store, config, resolve(config, store))
    for part in sequences.iter_slices(COMMIT_ROWS):
        _commit(key, part, generator)
    record_trust(key, NullTest(8, 0.0, 0.0, 0.0, 1e-3).to_dict())


def _commit(key: ScorerKey, part: pl.DataFrame, generator: np.random.Generator) -> None:
    tokens = [-generator.gamma(0.5, 2.0, n).astype(np.float32) for n in part["n_scored"]]
    scorer = {
        "model_id": [key.model.model_id] * part.height,
        "numerics_id": [key.numerics.numerics_id] * part.height,
        "sequence_id": part["sequence_id"],
    }
    sums = [float(values.astype(np.float64).sum()) for values in tokens]
    append(
        key,
        pl.DataFrame(
            {**scorer, "logprob": sums, "n_tokens": part["n_scored"]}, schema=polars_schema(LogProb)
        ),
        pl.DataFrame({**scorer, "logprobs": tokens}, schema=polars_schema(TokenLogProb)),
        {"checkpoint": "made up", "versions": "{}", "host": "here", "created_at": "now"},
    )
