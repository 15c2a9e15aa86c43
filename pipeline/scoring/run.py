"""Scoring a model over a table of sequences: what the ledger lacks, and nothing else."""

import datetime
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from time import monotonic

import numpy as np
import polars as pl

from pipeline.errors import ScoringError
from pipeline.models import Checkpoint, identify
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.progress import progress
from pipeline.scoring.deaths import Lost
from pipeline.scoring.engines import Batching, batching_of, numerics_of, open_engine
from pipeline.scoring.engines.base import (
    Engine,
    Group,
    Open,
    check_logprobs,
    groups_of,
    longest,
    sequence_sum,
)
from pipeline.scoring.engines.vllm_engine import vllm_package
from pipeline.scoring.ledger import (
    ScorerKey,
    append,
    last_trust,
    read_logprobs,
    record_differences,
    record_trust,
)
from pipeline.scoring.memory import OutOfMemory, halved, score_within_memory
from pipeline.scoring.null_test import NullTest, null_test
from pipeline.scoring.workers import Opening, Report, Run, workers
from pipeline.store import Store
from schemas import LogProb, TokenLogProb, UnscoredSequence, polars_schema


@dataclass(frozen=True)
class ScoringResult:
    """What a scoring pass did: `n_wanted = n_reused + n_scored + n_unscored`."""

    key: ScorerKey
    n_wanted: int
    n_reused: int
    n_scored: int
    n_unscored: int
    n_tokens: int
    tokens_per_second: float
    seconds: float
    model_loaded: bool
    null_test: NullTest


@dataclass(frozen=True)
class _Part:
    """What a worker scores and commits in one piece."""

    key: ScorerKey
    groups: list[Group]
    batching: Batching
    provenance: dict[str, str]


@dataclass(frozen=True)
class _Sample:
    """What a worker re-scores for the null test."""

    key: ScorerKey
    sequences: pl.DataFrame
    n_rows: int
    batch_tokens: int
    tolerance: float


def scorer_key(store: Store, config: ModelConfig, checkpoint: Checkpoint) -> ScorerKey:
    """Who would score, without loading anything."""
    return ScorerKey(store.ledger, identify(checkpoint, store), numerics_of(config, checkpoint))


def score_sequences(
    name: str,
    key: ScorerKey,
    config: ModelConfig,
    checkpoint: Checkpoint,
    sequences: pl.DataFrame,
    settings: ScoringConfig,
    open_engine: Open = open_engine,
) -> ScoringResult:
    """Score the sequences the ledger lacks for this scorer, commit them, and run the null test.

    A crash loses at most the parts in flight. The model is loaded only if something is to be
    scored or to be tested. A sequence that does not fit in memory even alone, or that engines die
    of, goes on record as unscored; it is tried again in the next pass.

    Raises:
        ScoringError: a sequence cannot be scored, the engine returned what cannot be a log-prob, or
            engines die too often.
        StoreError: the disk failed; what was committed stays.
    """
    started = monotonic()
    known = read_logprobs(key).join(sequences, on="sequence_id", how="semi")
    missing = sequences.join(known, on="sequence_id", how="anti")
    due = missing.height > 0 or settings.null_test == "always"
    recorded = None if due else last_trust(key)
    n_tokens, rate, n_unscored = 0, 0.0, 0
    if recorded is None:
        batching = batching_of(settings, key.numerics)
        opening = Opening(open_engine, config, checkpoint, longest(groups_of(sequences)))
        with workers(opening, key.numerics, settings.workers) as run:
            if missing.height:
                n_tokens, rate = _score_missing(name, key, checkpoint, run, missing, batching)
                scored = read_logprobs(key).join(missing, on="sequence_id", how="semi")
                n_unscored = missing.height - scored.height
                record_differences(key)
            tolerance = settings.tolerance(config.dtype)
            sample = _Sample(
                key, sequences, settings.null_test_rows, batching.batch_tokens, tolerance
            )
            (outcome,) = run(_test_sample, [sample], None, _with_fewer_rows)
            if isinstance(outcome, Lost):
                raise ScoringError(f"an engine died of the null test: {outcome.detail}")
            if outcome.n:
                record_trust(key, outcome.to_dict())
    else:
        outcome = NullTest(**recorded)
    return ScoringResult(
        key=key,
        n_wanted=sequences.height,
        n_reused=known.height,
        n_scored=missing.height - n_unscored,
        n_unscored=n_unscored,
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
    run: Run,
    missing: pl.DataFrame,
    batching: Batching,
) -> tuple[int, float]:
    """Score and commit in parts; returns tokens and tokens per second."""
    provenance = {
        "checkpoint": str(checkpoint.adapter or checkpoint.path),
        "versions": json.dumps({package: version(package) for package in _packages(key)}),
        "host": platform.node(),
    }
    parts = [
        _Part(key, groups, batching, provenance)
        for groups in _parts(groups_of(missing), lambda g: len(g.completions), batching.commit_rows)
    ]
    with progress(f"score {name}", missing.height) as bar:
        for done in run(_score_part, parts, bar.advance, _in_halves):
            if isinstance(done, Lost):
                _give_up(done)
            else:
                bar.advance(*done)
        return bar.n_tokens, bar.tokens_per_second


def _score_part(engine: Engine, part: _Part, report: Report | None) -> tuple[int, int]:
    """Score and commit a part; returns the (rows, tokens) that were not reported meanwhile."""
    rows: list[tuple[str, np.ndarray]] = []
    unscored: list[tuple[str, str]] = []
    for groups in _parts(part.groups, lambda group: group.n_tokens, part.batching.call_tokens):
        found = score_within_memory(engine, groups, part.batching.batch_tokens)
        for group, scored in zip(groups, found, strict=True):
            for completion, logprobs in zip(group.completions, scored, strict=True):
                if isinstance(logprobs, OutOfMemory):
                    unscored.append((completion.sequence_id, logprobs.detail))
                    continue
                check_logprobs(completion, logprobs)
                rows.append((completion.sequence_id, logprobs))
            if report is not None:
                report(len(group.completions), group.n_tokens)
    how = {
        **part.provenance,
        "created_at": _now(),
        "shared_prompts": engine.sharing.shared,
        "shared_prompts_reason": engine.sharing.reason,
    }
    tried = _unscored(part.key, "out_of_memory", unscored)
    append(part.key, *_frames(part.key, rows), how, tried)
    n_rows = sum(len(group.completions) for group in part.groups)
    return (n_rows, sum(group.n_tokens for group in part.groups)) if report is None else (0, 0)


def _in_halves(part: _Part) -> list[_Part]:
    """A part that engines die of, in two; none of one sequence."""
    return [replace(part, groups=groups) for groups in halved(part.groups) or ()]


def _give_up(lost: Lost) -> None:
    """Put the sequence that engines die of on record."""
    part: _Part = lost.item
    rows = [(c.sequence_id, lost.detail) for group in part.groups for c in group.completions]
    how = {**part.provenance, "created_at": _now()}
    tried = _unscored(part.key, "engine_died", rows)
    append(part.key, *_frames(part.key, []), how, tried)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _test_sample(engine: Engine, sample: _Sample, report: Report | None) -> NullTest:
    held = read_logprobs(sample.key)
    return null_test(
        engine, held, sample.sequences, sample.n_rows, sample.batch_tokens, sample.tolerance
    )


def _with_fewer_rows(sample: _Sample) -> list[_Sample]:
    """A sample that engines die of, half as large."""
    return [replace(sample, n_rows=sample.n_rows // 2)] if sample.n_rows > 1 else []


def _packages(key: ScorerKey) -> list[str]:
    packages = ["torch", "transformers", "logratio"]
    return [*packages, vllm_package()] if key.numerics.engine == "vllm" else packages


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


def _unscored(key: ScorerKey, rule: str, rows: list[tuple[str, str]]) -> pl.DataFrame:
    """`schemas.UnscoredSequence` rows from (sequence id, detail)."""
    ids = (key.model.model_id, key.numerics.numerics_id)
    return pl.DataFrame(
        [(*ids, sequence, rule, detail) for sequence, detail in rows],
        schema=polars_schema(UnscoredSequence),
        orient="row",
    )
