"""What a plan will cost, roughly, before anything is run.

Tokens are guessed from the text of some rows, minutes from the model's size and a measurement of
this machine that takes a second. What the store holds already is not taken off.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter

from pipeline.intake.run import source_files
from pipeline.models import parameter_count
from pipeline.plan import ModelConfig, Plan, SourceConfig
from pipeline.processes import threads_of
from pipeline.scoring.engines import engine_of
from pipeline.scoring.engines.torch_engine import found_device_class
from pipeline.sources import READERS, RowError, frame_rows, parse_object

_SAMPLE_ROWS = 200
_CHARACTERS_PER_TOKEN = 4.0
_TEMPLATE_TOKENS = 40
"""What a chat template adds to a conversation, a system prompt included."""

# Measured on two CPU cores, torch and vLLM in float32, with a model of 135 million parameters.
_EFFICIENCY = 0.85
"""Floating-point speed of a scoring pass over that of a plain matrix product."""
_TRAINED_OVER_SCORED = 2.4
"""What a token costs in training (forward, backward, LoRA) over scoring it."""
_START_SECONDS = {"torch": 15.0, "vllm": 30.0}
"""Start, imports, loading and the trust gates of a step that uses a model."""


@dataclass(frozen=True)
class Estimate:
    """Rough figures; `seconds` is None where they cannot be told (a GPU, a model not on disk)."""

    n_pairs: int
    n_tokens_scored: int
    n_tokens_trained: int
    seconds: float | None

    def __str__(self) -> str:
        """One line for a terminal."""
        work = (
            f"about {self.n_pairs:,} pairs; {self.n_tokens_scored:,} tokens to score, "
            f"{self.n_tokens_trained:,} to train on"
        )
        if self.seconds is None:
            return f"{work}; minutes cannot be estimated for this device or model"
        return f"{work}; some {max(1, round(self.seconds / 60))} min if nothing is there already"


@dataclass(frozen=True)
class _Pass:
    """One step that loads a model."""

    model: ModelConfig
    engine: str
    scored: float
    trained: float = 0.0
    alone: bool = False
    """Nothing else can run beside it: everything waits for its numbers."""


def estimate(plan: Plan) -> Estimate:
    """Estimate a plan from a sample of its rows.

    Raises:
        SourceError: a source cannot be read.
    """
    n_pairs, characters = _measure(plan)
    if plan.limit_pairs is not None:
        n_pairs = min(n_pairs, plan.limit_pairs)
    tokens = 2 * (characters / _CHARACTERS_PER_TOKEN + _TEMPLATE_TOKENS)
    passes = list(_passes(plan, n_pairs, tokens))
    sizes = {name: parameter_count(name) for name in {p.model.checkpoint for p in passes}}
    seconds: float | None = None
    if found_device_class() == "cpu" and None not in sizes.values():
        speed = _multiply_adds_per_second(threads_of(plan.model_steps)) * _EFFICIENCY
        seconds = sum(
            _START_SECONDS[p.engine]
            + (sizes[p.model.checkpoint] or 0)
            * (p.scored + _TRAINED_OVER_SCORED * p.trained)
            / speed
            / (1 if p.alone else plan.model_steps)
            for p in passes
        )
    return Estimate(
        n_pairs,
        round(sum(p.scored for p in passes)),
        round(sum(p.trained for p in passes)),
        seconds,
    )


def _passes(plan: Plan, n_pairs: int, tokens: float) -> Iterator[_Pass]:
    """Every step of the plan that loads a model; `tokens` is a pair's, both replies."""
    n_test = plan.split.test_share * n_pairs
    n_train = n_pairs - n_test
    seen = plan.training.epochs * n_train
    if plan.training.max_steps is not None:
        seen = min(seen, float(plan.training.max_steps * plan.training.batch_pairs))
    for name, model in plan.models.items():
        kl = sum(o.spec.needs_kl and o.reference == name for o in plan.objectives.values())
        yield _Pass(model, engine_of(model), (n_pairs + n_train * kl) * tokens, alone=True)
    parity = plan.scoring.parity
    for objective in plan.objectives.values():
        start, reference = plan.models[objective.start], plan.models[objective.reference]
        kl_tokens = seen * tokens if objective.spec.needs_kl else 0.0
        yield _Pass(start, "torch", kl_tokens, seen * tokens)
        yield _Pass(reference, engine_of(reference), n_pairs * tokens)
        if parity is not None:
            yield _Pass(reference, parity.engine, n_test * tokens)
    if parity is not None:
        for name in {objective.reference for objective in plan.objectives.values()}:
            yield _Pass(plan.models[name], parity.engine, n_test * tokens)


def _measure(plan: Plan) -> tuple[int, float]:
    """Rows of all sources, and the mean number of characters of one sequence among the first."""
    n_rows = 0
    lengths: list[int] = []
    for name, config in {**plan.sources, **plan.evaluation}.items():
        for _, path in source_files(name, config):
            for raw in frame_rows(path):
                n_rows += 1
                if len(lengths) < 2 * _SAMPLE_ROWS:
                    lengths += _characters(config, raw.data)
    return n_rows, fmean(lengths) if lengths else 0.0


def _characters(config: SourceConfig, row: bytes) -> list[int]:
    try:
        units = READERS[config.shape](parse_object(row))
    except RowError:
        return []
    return [
        sum(len(message["content"]) for message in unit.prompt) + len(reply)
        for unit in units
        for reply in (unit.chosen, unit.rejected)
    ]


def _multiply_adds_per_second(n_threads: int) -> float:
    """What torch's float32 matrix product does here; one per parameter and token is needed."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    a, b = torch.rand(128, 1536), torch.rand(1536, 1536)
    torch.mm(a, b)
    n, started = 0, perf_counter()
    while (elapsed := perf_counter() - started) < 0.5:
        torch.mm(a, b)
        n += 1
    torch.set_num_threads(before)
    return n * a.numel() * b.shape[1] / elapsed
