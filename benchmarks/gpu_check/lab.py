"""The workload, and the scorings that parts share: each is made once, however many ask for it."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import polars as pl

from benchmarks.gpu_check.processes import Elsewhere, elsewhere
from benchmarks.gpu_check.work import (
    LogProbs,
    Pass,
    make_untrained,
    open_here,
    score_all,
    score_here,
    time_here,
)
from pipeline import stages
from pipeline.intake import run_intake
from pipeline.models import Checkpoint, resolve
from pipeline.plan import ModelConfig, Plan, SourceConfig, VllmConfig
from pipeline.scoring.engines.base import Group, groups_of, sequence_sum
from pipeline.store import Store, read

Dtype = Literal["float32", "bfloat16", "float16"]
EngineName = Literal["torch", "vllm"]

SIDE_BY_SIDE = 0.4
"""Share of the GPU's memory for a vLLM engine that has a second engine beside it."""

_NAME = "gpu_check"
_MEASURABLE_SECONDS = 1.0


@dataclass(frozen=True)
class Difference:
    """How far two scorings of the same sequences are apart, nats.

    Attributes:
        token_bias: mean with its sign, first minus second; noise has none.
    """

    sequence_max: float
    sequence_mean: float
    token_max: float
    token_mean: float
    token_rms: float
    token_bias: float

    def __str__(self) -> str:
        """The two figures that say most."""
        return f"{self.sequence_max:.1e} a sequence, {self.token_rms:.1e} a token (RMS)"


def difference(first: LogProbs, second: LogProbs) -> Difference:
    """Compare two scorings, which must be of the same sequences."""
    if first.keys() != second.keys():
        raise ValueError("two scorings of different sequences")
    apart = [abs(sequence_sum(first[i]) - sequence_sum(second[i])) for i in first]
    tokens = np.concatenate(
        [first[i].astype(np.float64) - second[i].astype(np.float64) for i in first]
    )
    return Difference(
        sequence_max=max(apart),
        sequence_mean=sum(apart) / len(apart),
        token_max=float(np.abs(tokens).max()),
        token_mean=float(np.abs(tokens).mean()),
        token_rms=float(np.sqrt(np.square(tokens).mean())),
        token_bias=float(tokens.mean()),
    )


@dataclass(frozen=True)
class Race:
    """Two loaded engines, timed in turns.

    Attributes:
        seconds: per engine, of one call over the workload, a value per turn.
        calls: calls per turn, so that a turn is long enough to be timed.
        logprobs: what each engine gave for the workload.
    """

    seconds: dict[str, list[float]]
    calls: int
    logprobs: dict[str, LogProbs]

    def ratio(self, slow: str, fast: str) -> dict[str, Any]:
        """How many times longer `slow` takes: per turn, the median, and the spread."""
        ratios = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        return {
            "median": median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "turns": len(ratios),
        }


@dataclass
class Lab:
    """A workload on a machine; everything made for it is below `root`.

    Attributes:
        on_cuda: whether there is a CUDA device.
        dtypes: what is measured; the first is what is timed.
    """

    root: Path
    checkpoint: Checkpoint
    sequences: pl.DataFrame
    dtypes: list[Dtype]
    on_cuda: bool
    _passes: dict[str, Pass | Exception] = field(default_factory=dict)

    @property
    def sharpest(self) -> Dtype:
        """The dtype with the least noise, in which a wrong formula shows best."""
        return "float32" if "float32" in self.dtypes else self.dtypes[0]

    @property
    def groups(self) -> list[Group]:
        """The workload as engines take it."""
        return groups_of(self.sequences)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences, prompts included."""
        return sum(group.n_tokens for group in self.groups)

    @property
    def n_scored(self) -> int:
        """Tokens that get a log-prob."""
        return int(self.sequences["n_scored"].sum())

    def config(self, engine: EngineName, dtype: Dtype, **vllm: Any) -> ModelConfig:
        """How a plan would say it."""
        return ModelConfig(
            checkpoint=str(self.checkpoint.path),
            engine=engine,
            dtype=dtype,
            vllm=VllmConfig(**vllm),
        )

    def scored(
        self,
        engine: EngineName,
        dtype: Dtype,
        variant: str = "plain",
        checkpoint: Checkpoint | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Pass:
        """Score everything in a process of its own; a second asking gets the first's answer.

        Args:
            engine: which engine.
            dtype: of the body.
            variant: a name for what is set below.
            checkpoint: another one than the workload's.
            environment: variables for the process.

        Raises:
            Exception: whatever the scoring raised, again at every asking.
        """
        name = f"{engine}-{dtype}-{variant}"
        if name not in self._passes:
            try:
                self._passes[name] = elsewhere(
                    environment or {},
                    score_all,
                    Store(self.root, _NAME),
                    self.root / "passes" / name,
                    self.config(engine, dtype),
                    checkpoint or self.checkpoint,
                    self.sequences,
                    64 if self.on_cuda else 8,
                )
            except Exception as error:
                self._passes[name] = error
        result = self._passes[name]
        if isinstance(result, Exception):
            raise result
        return result

    def untrained(self) -> Pass:
        """The control of every comparison: the same config without the training."""
        directory = self.root / "untrained"
        if not directory.exists():
            elsewhere({}, make_untrained, self.checkpoint, directory)
        return self.scored("torch", "float32", "untrained", Checkpoint(directory))

    def race(self, entrants: dict[str, ModelConfig]) -> Race:
        """Load the engines beside each other and time them in turns, at least three.

        The first call of each compiles kernels; it gives the log-probs and is not timed.
        """
        groups = self.groups
        with ExitStack() as stack:
            processes = {name: stack.enter_context(Elsewhere({})) for name in entrants}
            for name, process in processes.items():
                process.call(open_here, entrants[name], self.checkpoint, groups)
            logprobs = {name: p.call(score_here, groups) for name, p in processes.items()}
            fastest = min(process.call(time_here, groups, 1) for process in processes.values())
            calls = math.ceil(_MEASURABLE_SECONDS / fastest)
            seconds: dict[str, list[float]] = {name: [] for name in processes}
            for _ in range(5 if self.on_cuda else 3):
                for name, process in processes.items():
                    seconds[name].append(process.call(time_here, groups, calls))
        return Race(seconds, calls, logprobs)


def prepare(
    root: Path,
    store: Path,
    model: str,
    pairs: Path,
    limit: int | None,
    dtypes: list[Dtype],
    on_cuda: bool,
) -> Lab:
    """Find the model, read and tokenise the pairs.

    Args:
        root: an empty directory for everything but a packaged model.
        store: where a packaged model is written out, or is already.
        model: as a plan's `checkpoint`.
        pairs: JSON lines in the conversational shape.
        limit: how many pairs, or None for all.
        dtypes: what will be measured.
        on_cuda: whether there is a CUDA device.

    Raises:
        LogratioError: there is no such model, or no valid pair.
    """
    checkpoint = resolve(ModelConfig(checkpoint=model), Store(store.resolve(), _NAME))
    plan = Plan(
        name=_NAME,
        store=root,
        sources={"pairs": SourceConfig(path=pairs, shape="conversational")},
        models={"model": ModelConfig(checkpoint=str(checkpoint.path))},
        limit_pairs=limit,
    )
    tables = Store(root, _NAME)
    run_intake(plan, tables)
    stages.tokenize(plan, tables)
    found = Checkpoint(checkpoint.path.resolve())
    return Lab(root, found, read(tables, "sequences"), dtypes, on_cuda)
