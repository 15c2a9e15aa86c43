"""What an engine is given and gives back, and the numerics that its numbers depend on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl

from pipeline.errors import ScoringError
from pipeline.ids import content_id
from pipeline.models import Checkpoint
from pipeline.plan import Extra, ModelConfig


@dataclass(frozen=True)
class Numerics:
    """The fields of `schemas.Scorer` that make a `numerics_id`.

    Whatever may change a log-prob beyond the noise floor while the model stays the same. Never a
    path, a batch size, or anything of the training.
    """

    engine: str
    engine_version: str
    modeling_version: str
    runner: str
    body_dtype: str
    head_dtype: str
    cache_dtype: str
    attention_backend: str
    quantisation: str
    prefix_reuse: str
    tensor_parallel: int
    pipeline_parallel: int
    batch_invariant: bool
    device_class: str
    adapter_mode: str

    @property
    def numerics_id(self) -> str:
        """Content id over every field."""
        return content_id("numerics", asdict(self))

    def comparable(self, other: "Numerics") -> bool:
        """Whether log-probs of the two may be subtracted: equal but for an adapter applied."""
        return {**asdict(self), "adapter_mode": ""} == {**asdict(other), "adapter_mode": ""}


@dataclass(frozen=True)
class Completion:
    """A reply to score: its token ids, int32 [n], and the half-open ranges that count.

    Completions of a group with one `pass_id` may share a forward pass (`pipeline.scoring.passes`).
    """

    sequence_id: str
    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    pass_id: str | None = None

    @property
    def scored(self) -> np.ndarray:
        """Positions in `ids` that count, int64 [n_scored]."""
        return np.concatenate([np.arange(start, end) for start, end in self.spans])


@dataclass(frozen=True)
class Group:
    """One prompt, int32 [n], with the completions to score under it."""

    prompt_ids: np.ndarray
    completions: tuple[Completion, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of all its sequences, the prompt counted with each."""
        return sum(len(self.prompt_ids) + len(c.ids) for c in self.completions)


@dataclass(frozen=True)
class Sharing:
    """Whether a model's prompts are computed once for several completions, as an engine found.

    Attributes:
        shared: they are.
        reason: why not; empty if they are.
        exact: what else is computed with a sequence changes no bit of it, as far as was seen.
    """

    shared: bool
    reason: str = ""
    exact: bool = False


class Engine(Protocol):
    """Computes log-probs. An engine owns a loaded model and is closed by whoever opened it."""

    @property
    def sharing(self) -> Sharing:
        """Whether it shares prompts; goes on record with the scorer."""
        ...

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        """Per group and completion, the log-probs of its scored tokens: float32 [n_scored], nats.

        `batch_tokens` bounds a forward pass, padding included, a shared prompt counted once; 0
        means one at a time: a sequence, or those that share a pass.

        Raises:
            ScoringError: a row cannot be scored, or what came out cannot be its log-probs.
            EngineDied: the engine is lost; another one may be opened.
        """
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


@dataclass(frozen=True)
class TokenScores:
    """A completion's log-probs and what else was asked of its tokens, float32 [n_scored] each.

    Attributes:
        logprobs: nats, as `Engine.score` gives them.
        extras: by name.
    """

    logprobs: np.ndarray
    extras: Mapping[Extra, np.ndarray]


@runtime_checkable
class EngineWithExtras(Engine, Protocol):
    """An engine that can tell more of a token's distribution than the log-prob of the token."""

    def score_with_extras(
        self, groups: Sequence[Group], batch_tokens: int, extras: Sequence[Extra]
    ) -> list[list[TokenScores]]:
        """`score`, with the same log-probs to the bit, and the extras."""
        ...


Open = Callable[[ModelConfig, Checkpoint, int], Engine]
"""(how to run it, the model, tokens of the longest sequence to come) to an engine."""


class EngineDied(ScoringError):
    """The engine is lost with what it was scoring."""


@dataclass(frozen=True)
class Limits:
    """What a model can take: ids below `vocab_size`, `max_length` tokens; None for no limit."""

    vocab_size: int
    max_length: int | None


def require_scorable(groups: Sequence[Group], limits: Limits) -> None:
    """Refuse rows before an engine sees them: some engines die of one, and take the rest along.

    Raises:
        ScoringError: ids that are no integers or no ids of the model, nothing to condition on,
            nothing to score, or too long; names the sequences.
    """
    faults = []
    for group in groups:
        for completion in group.completions:
            if fault := _fault(group.prompt_ids, completion, limits):
                faults.append(f"sequence {completion.sequence_id}: {fault}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ScoringError(f"cannot be scored: {'; '.join(faults[:3])}{more}")


def _fault(prompt_ids: np.ndarray, completion: Completion, limits: Limits) -> str | None:
    for what, ids in (("prompt", prompt_ids), ("completion", completion.ids)):
        ids = np.asarray(ids)
        if not ids.size:
            return f"its {what} is empty"
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            return f"its {what}'s ids are {ids.ndim}-dimensional {ids.dtype}, not integers [n]"
        if ids.min() < 0 or ids.max() >= limits.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            return f"id {wrong} in its {what} is outside the vocabulary of {limits.vocab_size}"
    if not any(end > start for start, end in completion.spans):
        return "no token of it counts"
    if any(not 0 <= start <= end <= len(completion.ids) for start, end in completion.spans):
        return f"its spans {list(completion.spans)} leave its {len(completion.ids)} tokens"
    length = len(prompt_ids) + len(completion.ids)
    if limits.max_length is not None and length > limits.max_length:
        return f"{length} tokens, and the model holds {limits.max_length}"
    return None


def groups_of(sequences: pl.DataFrame) -> list[Group]:
    """Rows of the `sequences` table as groups, one per distinct prompt, the longest first.

    The longest first, so that what does not fit in memory shows at once. A column `pass_id`
    (`pipeline.scoring.passes`) may stand beside the table's own.
    """
    by_prompt: dict[bytes, tuple[np.ndarray, list[Completion]]] = {}
    for row in sequences.iter_rows(named=True):
        prompt = np.asarray(row["prompt_ids"], dtype=np.int32)
        completion = Completion(
            row["sequence_id"],
            np.asarray(row["completion_ids"], dtype=np.int32),
            tuple((span["start"], span["end"]) for span in row["spans"]),
            row.get("pass_id"),
        )
        by_prompt.setdefault(prompt.tobytes(), (prompt, []))[1].append(completion)
    groups = [Group(prompt, tuple(completions)) for prompt, completions in by_prompt.values()]
    return sorted(groups, key=_order, reverse=True)


_ROUNDING = 1e-3
"""Nats by which float32 may leave what is possible."""


def check_logprobs(completion: Completion, logprobs: np.ndarray) -> None:
    """Refuse what cannot be log-probs of that completion.

    Raises:
        ScoringError: wrong length, not finite, or above 0 by more than rounding.
    """
    expected = len(completion.scored)
    if logprobs.shape != (expected,):
        raise ScoringError(
            f"sequence {completion.sequence_id}: {logprobs.shape} log-probs for {expected} tokens"
        )
    if not np.isfinite(logprobs).all():
        raise ScoringError(f"sequence {completion.sequence_id}: a log-prob is NaN or infinite")
    if (logprobs > 1e-4).any():
        raise ScoringError(f"sequence {completion.sequence_id}: a log-prob is above 0")


def check_scores(completion: Completion, scores: TokenScores) -> None:
    """`check_logprobs`, of the extras as well.

    Raises:
        ScoringError: wrong length, not finite, or outside what a distribution can have: no p(v) is
            above 1, and the token's own counts.
    """
    check_logprobs(completion, scores.logprobs)
    for name, values in scores.extras.items():
        if values.shape != scores.logprobs.shape:
            raise ScoringError(
                f"sequence {completion.sequence_id}: {values.shape} values of {name} for "
                f"{len(scores.logprobs)} tokens"
            )
        if not np.isfinite(values).all():
            raise ScoringError(f"sequence {completion.sequence_id}: NaN or infinite {name}")
        if name == "log_sum_squares":
            possible = (values <= _ROUNDING) & (values >= 2 * scores.logprobs - _ROUNDING)
        else:
            possible = values >= -_ROUNDING
        if not possible.all():
            raise ScoringError(f"sequence {completion.sequence_id}: no distribution has its {name}")


def sequence_sum(logprobs: np.ndarray) -> float:
    """The exact sum of token log-probs, rounded once to float64: no order of adding changes it."""
    return math.fsum(logprobs.tolist())


def major_minor(package: str) -> str:
    """An installed package's version, major.minor."""
    return ".".join(version(package).split(".")[:2])


def longest(groups: Sequence[Group]) -> int:
    """Tokens of the longest sequence in some groups, its prompt included."""
    return max(len(g.prompt_ids) + len(c.ids) for g in groups for c in g.completions)


def _order(group: Group) -> tuple[int, str]:
    return longest([group]), group.completions[0].sequence_id
