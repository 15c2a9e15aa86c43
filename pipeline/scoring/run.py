"""Scoring a model over a table of sequences: what the ledger lacks, and nothing else."""

import datetime
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from time import monotonic

import polars as pl

from pipeline.errors import ScoringError
from pipeline.models import Checkpoint, identify
from pipeline.plan import Extra, ModelConfig, ScoringConfig
from pipeline.progress import progress
from pipeline.scoring.deaths import Lost
from pipeline.scoring.engines import Batching, batching_of, numerics_of, open_engine
from pipeline.scoring.engines.base import (
    Engine,
    EngineWithExtras,
    Group,
    Open,
    TokenScores,
    check_scores,
    groups_of,
    longest,
    sequence_sum,
)
from pipeline.scoring.engines.vllm_engine import vllm_package
from pipeline.scoring.ledger import (
    ScorerKey,
    append,
    last_trust,
    read_complete,
    read_extras,
    read_logprobs,
    record_differences,
    record_trust,
)
from pipeline.scoring.memory import OutOfMemory, halved, within_memory
from pipeline.scoring.null_test import NullTest, null_test
from pipeline.scoring.workers import Opening, Report, Run, workers
from pipeline.store import Store
from schemas import (
    LogProb,
    SequenceExtra,
    TokenExtra,
    TokenLogProb,
    UnscoredSequence,
    polars_schema,
)


@dataclass(frozen=True)
class ScoringResult:
    """What a scoring pass did: `n_wanted = n_reused + n_scored + n_unscored`.

    A sequence of which an extra was missing is no reused one, though its log-prob is.
    """

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
class _Missing:
    """Sequences that lack the same: their log-probs or not, and some extras."""

    sequences: pl.DataFrame
    logprobs: bool
    extras: tuple[Extra, ...]


@dataclass(frozen=True)
class _Part:
    """What a worker scores and commits in one piece; log-probs only where they are missing."""

    key: ScorerKey
    groups: list[Group]
    batching: Batching
    provenance: dict[str, str]
    logprobs: bool
    extras: tuple[Extra, ...]


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
    extras: Sequence[Extra] = (),
) -> ScoringResult:
    """Score the sequences the ledger lacks for this scorer, commit them, and run the null test.

    A sequence that has a log-prob and lacks one of `extras` is scored for that alone: the log-prob
    stays what it was.

    A crash loses at most the parts in flight. The model is loaded only if something is to be
    scored or to be tested. A sequence that does not fit in memory even alone, or that engines die
    of, goes on record as unscored; it is tried again in the next pass.

    Raises:
        ScoringError: a sequence cannot be scored, the engine returned what cannot be a log-prob,
            engines die too often, or they do not know the extras.
        StoreError: the disk failed; what was committed stays.
    """
    if extras and key.numerics.engine == "vllm":
        raise ScoringError(
            f"scoring.token_extras: '{name}' is scored by vLLM, and only the torch engine computes "
            f"{', '.join(extras)}: set its reference's engine to torch"
        )
    started = monotonic()
    missing = _missing(key, sequences, tuple(sorted(set(extras))))
    n_missing = sum(one.sequences.height for one in missing)
    due = n_missing > 0 or settings.null_test == "always"
    recorded = None if due else last_trust(key)
    n_tokens, rate, n_unscored = 0, 0.0, 0
    if recorded is None:
        batching = batching_of(settings, key.numerics)
        opening = Opening(open_engine, config, checkpoint, longest(groups_of(sequences)))
        with workers(opening, key.numerics, settings.workers) as run:
            if missing:
                n_tokens, rate = _score_missing(name, key, checkpoint, run, missing, batching)
                ids = pl.concat([one.sequences.select("sequence_id") for one in missing])
                whole = read_complete(key, extras).join(ids, on="sequence_id", how="semi")
                n_unscored = n_missing - whole.height
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
        n_reused=sequences.height - n_missing,
        n_scored=n_missing - n_unscored,
        n_unscored=n_unscored,
        n_tokens=n_tokens,
        tokens_per_second=rate,
        seconds=monotonic() - started,
        model_loaded=recorded is None,
        null_test=outcome,
    )


def _missing(key: ScorerKey, sequences: pl.DataFrame, extras: tuple[Extra, ...]) -> list[_Missing]:
    """What the ledger lacks of the sequences; those without a log-prob first."""
    # Before the log-probs: a commit that is found damaged takes its log-probs along.
    known = read_extras(key) if extras else None
    bare = sequences.join(read_logprobs(key), on="sequence_id", how="anti")
    found = [_Missing(bare, True, extras)] if bare.height else []
    if known is None:
        return found
    scored = sequences.join(bare, on="sequence_id", how="anti")
    lacking: dict[tuple[Extra, ...], pl.DataFrame] = {(): scored}
    for extra in extras:
        ids = known.filter(pl.col("extra") == extra)
        for lacked, some in list(lacking.items()):
            lacking[lacked] = some.join(ids, on="sequence_id", how="semi")
            lacking[*lacked, extra] = some.join(ids, on="sequence_id", how="anti")
    del lacking[()]
    return found + [_Missing(some, False, of) for of, some in lacking.items() if some.height]


def _score_missing(
    name: str,
    key: ScorerKey,
    checkpoint: Checkpoint,
    run: Run,
    missing: list[_Missing],
    batching: Batching,
) -> tuple[int, float]:
    """Score and commit in parts; returns tokens and tokens per second."""
    provenance = {
        "checkpoint": str(checkpoint.adapter or checkpoint.path),
        "versions": json.dumps({package: version(package) for package in _packages(key)}),
        "host": platform.node(),
    }
    parts = [
        _Part(key, groups, batching, provenance, one.logprobs, one.extras)
        for one in missing
        for groups in _parts(
            groups_of(one.sequences), lambda g: len(g.completions), batching.commit_rows
        )
    ]
    with progress(f"score {name}", sum(one.sequences.height for one in missing)) as bar:
        for done in run(_score_part, parts, bar.advance, _in_halves):
            if isinstance(done, Lost):
                _give_up(done)
            else:
                bar.advance(*done)
        return bar.n_tokens, bar.tokens_per_second


def _score_part(engine: Engine, part: _Part, report: Report | None) -> tuple[int, int]:
    """Score and commit a part; returns the (rows, tokens) that were not reported meanwhile."""
    rows: list[tuple[str, TokenScores]] = []
    unscored: list[tuple[str, str]] = []
    score = _scorer(engine, part)
    for groups in _parts(part.groups, lambda group: group.n_tokens, part.batching.call_tokens):
        found = within_memory(score, groups)
        for group, scored in zip(groups, found, strict=True):
            for completion, scores in zip(group.completions, scored, strict=True):
                if isinstance(scores, OutOfMemory):
                    unscored.append((completion.sequence_id, scores.detail))
                    continue
                check_scores(completion, scores)
                rows.append((completion.sequence_id, scores))
            if report is not None:
                report(len(group.completions), group.n_tokens)
    how = {
        **part.provenance,
        "created_at": _now(),
        "shared_prompts": engine.sharing.shared,
        "shared_prompts_reason": engine.sharing.reason,
    }
    tried = _unscored(part.key, "out_of_memory", unscored)
    frames = _frames(part.key, rows if part.logprobs else [])
    append(part.key, *frames, how, tried, _extra_frames(part.key, rows) if part.extras else None)
    n_rows = sum(len(group.completions) for group in part.groups)
    return (n_rows, sum(group.n_tokens for group in part.groups)) if report is None else (0, 0)


def _scorer(engine: Engine, part: _Part) -> Callable[[Sequence[Group]], list[list[TokenScores]]]:
    """How the engine is asked for what is missing of a part.

    Raises:
        ScoringError: it does not know the extras.
    """
    batch_tokens = part.batching.batch_tokens
    if part.extras:
        if not isinstance(engine, EngineWithExtras):
            raise ScoringError(f"{type(engine).__name__} does not compute {', '.join(part.extras)}")
        return partial(engine.score_with_extras, batch_tokens=batch_tokens, extras=part.extras)
    return lambda groups: [
        [TokenScores(row, {}) for row in rows] for rows in engine.score(groups, batch_tokens)
    ]


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
    key: ScorerKey, rows: list[tuple[str, TokenScores]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of the two tables of log-probs; sums are exact, rounded once to float64."""
    scorer = {"model_id": key.model.model_id, "numerics_id": key.numerics.numerics_id}
    sums = [
        {
            **scorer,
            "sequence_id": sequence,
            "logprob": sequence_sum(scores.logprobs),
            "n_tokens": len(scores.logprobs),
        }
        for sequence, scores in rows
    ]
    tokens = [
        {**scorer, "sequence_id": sequence, "logprobs": scores.logprobs}
        for sequence, scores in rows
    ]
    return (
        pl.DataFrame(sums, schema=polars_schema(LogProb)),
        pl.DataFrame(tokens, schema=polars_schema(TokenLogProb)),
    )


def _extra_frames(
    key: ScorerKey, rows: list[tuple[str, TokenScores]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of the two tables of extras, likewise."""
    scorer = {"model_id": key.model.model_id, "numerics_id": key.numerics.numerics_id}
    found = [
        ({**scorer, "sequence_id": sequence, "extra": extra}, values)
        for sequence, scores in rows
        for extra, values in scores.extras.items()
    ]
    sums = [{**of, "total": sequence_sum(v), "n_tokens": len(v)} for of, v in found]
    tokens = [{**of, "values": values} for of, values in found]
    return (
        pl.DataFrame(sums, schema=polars_schema(SequenceExtra)),
        pl.DataFrame(tokens, schema=polars_schema(TokenExtra)),
    )


def _unscored(key: ScorerKey, rule: str, rows: list[tuple[str, str]]) -> pl.DataFrame:
    """`schemas.UnscoredSequence` rows from (sequence id, detail)."""
    ids = (key.model.model_id, key.numerics.numerics_id)
    return pl.DataFrame(
        [(*ids, sequence, rule, detail) for sequence, detail in rows],
        schema=polars_schema(UnscoredSequence),
        orient="row",
    )
