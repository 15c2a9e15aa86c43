"""Scoring a model over a table of sequences: what the ledger lacks, and nothing else."""

import datetime
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from time import monotonic

import numpy as np
import polars as pl

from pipeline.models import Checkpoint, identify
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.progress import progress
from pipeline.scoring.engine import (
    Engine,
    Group,
    check_logprobs,
    groups_of,
    sequence_sum,
)
from pipeline.scoring.ledger import ScorerKey, append, last_trust, read_logprobs, record_trust
from pipeline.scoring.null_test import NullTest, null_test
from pipeline.scoring.torch_engine import TorchEngine, torch_numerics
from pipeline.store import Store
from schemas import LogProb, TokenLogProb, polars_schema

Open = Callable[[ModelConfig, Checkpoint], Engine]


@dataclass(frozen=True)
class ScoringResult:
    """What a scoring pass did: `n_wanted = n_reused + n_scored`."""

    key: ScorerKey
    n_wanted: int
    n_reused: int
    n_scored: int
    n_tokens: int
    tokens_per_second: float
    seconds: float
    model_loaded: bool
    null_test: NullTest


def scorer_key(store: Store, config: ModelConfig, checkpoint: Checkpoint) -> ScorerKey:
    """Who would score, without loading anything."""
    return ScorerKey(store.ledger, identify(checkpoint, store), torch_numerics(config, checkpoint))


def score_sequences(
    name: str,
    key: ScorerKey,
    config: ModelConfig,
    checkpoint: Checkpoint,
    sequences: pl.DataFrame,
    settings: ScoringConfig,
    open_engine: Open = TorchEngine,
) -> ScoringResult:
    """Score the sequences the ledger lacks for this scorer, commit them, and run the null test.

    A crash loses at most `commit_rows` sequences. The model is loaded only if something is to be
    scored or to be tested.

    Raises:
        ScoringError: the engine returned what cannot be a log-prob.
        StoreError: the disk failed; what was committed stays.
    """
    started = monotonic()
    known = read_logprobs(key).join(sequences, on="sequence_id", how="semi")
    missing = sequences.join(known, on="sequence_id", how="anti")
    due = missing.height > 0 or settings.null_test == "always"
    recorded = None if due else last_trust(key)
    n_tokens, rate = 0, 0.0
    if recorded is None:
        with closing(open_engine(config, checkpoint)) as engine:
            if missing.height:
                n_tokens, rate = _score_missing(name, key, checkpoint, engine, missing, settings)
            tolerance = settings.tolerance(config.dtype)
            outcome = null_test(engine, read_logprobs(key), sequences, settings, tolerance)
            record_trust(key, outcome.to_dict())
    else:
        outcome = NullTest(**recorded)
    return ScoringResult(
        key=key,
        n_wanted=sequences.height,
        n_reused=known.height,
        n_scored=missing.height,
        n_tokens=n_tokens,
        tokens_per_second=rate,
        seconds=monotonic() - started,
        model_loaded=recorded is None,
        null_test=outcome,
    )


def _score_missing(
    name: str,
    key: ScorerKey,
    checkpoint: Checkpoint,
    engine: Engine,
    missing: pl.DataFrame,
    settings: ScoringConfig,
) -> tuple[int, float]:
    """Score and commit in parts; returns tokens and tokens per second."""
    provenance = {
        "checkpoint": str(checkpoint.adapter or checkpoint.path),
        "versions": json.dumps({p: version(p) for p in ("torch", "transformers", "logratio")}),
        "host": platform.node(),
    }
    with progress(f"score {name}", missing.height) as bar:
        parts = _parts(groups_of(missing), lambda g: len(g.completions), settings.commit_rows)
        for part in parts:
            rows = []
            # A few groups at a time, so that the bar moves while a part is being filled.
            for groups in _parts(part, lambda group: group.n_tokens, settings.batch_tokens):
                for group, scored in zip(
                    groups, engine.score(groups, settings.batch_tokens), strict=True
                ):
                    for completion, logprobs in zip(group.completions, scored, strict=True):
                        check_logprobs(completion, logprobs)
                        rows.append((completion.sequence_id, logprobs))
                    bar.advance(len(group.completions), group.n_tokens)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            append(key, *_frames(key, rows), {**provenance, "created_at": now})
        return bar.n_tokens, bar.tokens_per_second


def _parts(
    groups: Sequence[Group], size: Callable[[Group], int], enough: int
) -> Iterator[list[Group]]:
    """Cut groups into runs, each ending as soon as its sizes add up to `enough`."""
    part: list[Group] = []
    total = 0
    for group in groups:
        part.append(group)
        total += size(group)
        if total >= enough:
            yield part
            part, total = [], 0
    if part:
        yield part


def _frames(
    key: ScorerKey, rows: list[tuple[str, np.ndarray]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of the two ledger tables; sums are exact, rounded once to float64."""
    scorer = {"model_id": key.model.model_id, "numerics_id": key.numerics.numerics_id}
    sums = [
        {
            **scorer,
            "sequence_id": sequence,
            "logprob": sequence_sum(logprobs),
            "n_tokens": len(logprobs),
        }
        for sequence, logprobs in rows
    ]
    tokens = [
        {**scorer, "sequence_id": sequence, "logprobs": logprobs} for sequence, logprobs in rows
    ]
    return (
        pl.DataFrame(sums, schema=polars_schema(LogProb)),
        pl.DataFrame(tokens, schema=polars_schema(TokenLogProb)),
    )
