"""What a plan will cost, roughly, before anything is run.

Tokens are guessed from the text of some rows, minutes from the model's size and a measurement of
this machine that takes a second. What the ledger holds of the models' sequences, as the last run
has tokenised them, is taken off; what it holds of trained policies is not, for they may be others
this time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter

import polars as pl

from pipeline.errors import StoreError
from pipeline.intake.sources import raw_rows, shape_of_source
from pipeline.models import ModelSize, located, model_size
from pipeline.names import store_of, wanted_extras, wanted_sequences
from pipeline.plan import ModelConfig, Plan, SourceConfig
from pipeline.processes import threads_of
from pipeline.scoring.engines import engine_of
from pipeline.scoring.engines.torch_engine import found_device_class
from pipeline.scoring.ledger import read_complete
from pipeline.scoring.run import scorer_key
from pipeline.sources import READERS, Candidate, RawRow, Reader, RowError, Unit, parse_row

_SAMPLE_ROWS = 200
_CHARACTERS_PER_TOKEN = 4.0
_TEMPLATE_TOKENS = 40
"""What a chat template adds to a conversation, a system prompt included."""

# Measured on two CPU cores, torch and vLLM in float32, with a model of 135 million parameters.
_EFFICIENCY = 0.85
"""Floating-point speed of a scoring pass over that of a plain matrix product."""
_BACKWARD_OVER_SCORED = 1.4
"""What a token's way back costs, with LoRA in every layer, over scoring it."""
_START_SECONDS = {"torch": 15.0, "vllm": 30.0}
"""Start, imports, loading and the trust gates of a step that uses a model."""


@dataclass(frozen=True)
class Estimate:
    """Rough figures.

    Attributes:
        n_pairs: of all sources.
        n_tokens_scored: tokens to score, those of known sequences not counted.
        n_tokens_trained: to train on.
        seconds: None where they cannot be told (a GPU, a model not on disk).
        n_known: log-probs of sequences that are wanted and in the ledger already.
    """

    n_pairs: int
    n_tokens_scored: int
    n_tokens_trained: int
    seconds: float | None
    n_known: int = 0

    def __str__(self) -> str:
        """One line for a terminal."""
        work = (
            f"about {self.n_pairs:,} pairs; {self.n_tokens_scored:,} tokens to score, "
            f"{self.n_tokens_trained:,} to train on"
        )
        if self.n_known:
            work += f", {self.n_known:,} log-probs are in the ledger"
        if self.seconds is None:
            return f"{work}; minutes cannot be estimated for this device or model"
        if self.seconds == 0:
            return f"{work}; no model will be loaded"
        return f"{work}; some {max(1, round(self.seconds / 60))} min"


@dataclass(frozen=True)
class _Pass:
    """One step that loads a model."""

    model: ModelConfig
    engine: str
    scored: float
    """Pairs; as many tokens as both their sequences hold."""
    name: str | None = None
    """Who scores, if that is known before the run: a model, or an audit's policy."""
    trained: float = 0.0
    """Pairs."""
    at_once: int = 1
    """Passes that run side by side, each on its share of the cores."""


def estimate(plan: Plan) -> Estimate:
    """Estimate a plan from a sample of its rows.

    Raises:
        SourceError: a source cannot be read.
    """
    n_pairs, prompt, reply = _measure(plan)
    if plan.limit_pairs is not None:
        n_pairs = min(n_pairs, plan.limit_pairs)
    found = [_without_known(plan, one) for one in _passes(plan, n_pairs)]
    passes = [one for one, _ in found]
    sizes = {name: model_size(name) for name in {p.model.checkpoint for p in passes}}
    seconds: float | None = None
    if found_device_class() == "cpu" and None not in sizes.values():
        # Measured once for each number of processes, since it takes half a second.
        speeds = {n: _multiply_adds_per_second(threads_of(n)) for n in {p.at_once for p in passes}}
        # A pair's two sequences share their prompt.
        seconds = sum(
            _seconds(plan, p, sizes[p.model.checkpoint], prompt + 2 * reply, speeds[p.at_once])
            for p in passes
        )
    tokens = 2 * (prompt + reply)
    return Estimate(
        n_pairs,
        round(sum(p.scored for p in passes) * tokens),
        round(sum(p.trained for p in passes) * tokens),
        seconds,
        sum(n for _, n in found),
    )


def _without_known(plan: Plan, one: _Pass) -> tuple[_Pass, int]:
    """A pass without what the ledger holds, and how many sequences that is."""
    if one.name is None:
        return one, 0
    store = store_of(plan)
    audit = plan.audits.get(one.name)
    checkpoint = located(plan.models[audit.policy] if audit else one.model, store)
    if checkpoint is None:
        return one, 0
    try:
        wanted = wanted_sequences(plan, store, one.name)
        key = scorer_key(store, one.model, checkpoint)
        held = read_complete(key, wanted_extras(plan, one.name))
    except StoreError:  # nothing has been tokenised yet
        return one, 0
    known = wanted.join(held, on="sequence_id", how="semi")
    # As many pairs as have their tokens, since a pass's cost is told in pairs.
    tokens = pl.sum("n_prompt") + pl.col("completion_ids").list.len().sum()
    share = known.select(tokens).item() / max(1, wanted.select(tokens).item())
    left = max(0.0, one.scored - share * wanted.height / 2)
    # Half a pair is rounding: the estimate counts pairs, the tables distinct sequences.
    return replace(one, scored=left if left >= 0.5 else 0.0), known.height


def _seconds(
    plan: Plan, one: _Pass, size: ModelSize | None, tokens: float, multiply_adds: float
) -> float:
    """What a pass adds to the run; `tokens` is a pair's, `multiply_adds` are per second."""
    assert size is not None
    speed = multiply_adds * _EFFICIENCY
    last = plan.training.lora.last_layers
    adapted = 1.0 if last is None else min(1.0, last / size.layers)
    if not one.scored and not one.trained:
        return 0.0  # nothing is loaded
    pairs = one.scored + one.trained * (1 + _BACKWARD_OVER_SCORED * adapted)
    return (_START_SECONDS[one.engine] + size.parameters * pairs * tokens / speed) / one.at_once


def _passes(plan: Plan, n_pairs: int) -> Iterator[_Pass]:
    """Every step of the plan that loads a model."""
    n_test = plan.split.test_share * n_pairs if plan.sources else n_pairs
    n_train = n_pairs - n_test
    seen = plan.training.epochs * n_train
    if plan.training.max_steps is not None:
        seen = min(seen, float(plan.training.max_steps * plan.training.batch_pairs))
    at_once = min(plan.model_steps, len(plan.scored_models))

    def everything(name: str) -> float:
        kl = sum(o.spec.needs_kl and o.reference == name for o in plan.objectives.values())
        return n_pairs + n_train * kl

    for name in plan.scored_models:
        model = plan.models[name]
        yield _Pass(model, engine_of(model), everything(name), name, at_once=at_once)
    widest = max(map(len, plan.rounds), default=0) + len(plan.audits)
    at_once = min(plan.model_steps, max(1, widest))
    most = plan.scoring.train_pairs
    n_reported = n_test + (n_train if most is None else min(n_train, most))
    for objective in plan.objectives.values():
        # Mismatched replies, and a first look at the step's own, are run without a gradient.
        looked_at = seen * (objective.spec.needs_kl + objective.spec.needs_batch)
        start = plan.trained_as(objective.start)
        yield _Pass(start, "torch", looked_at, trained=seen, at_once=at_once)
    for name in plan.policies:
        scorer = plan.scored_as(name)
        who = name if name in plan.audits else None
        n_scored = everything(name) if name in plan.bases else n_reported
        yield _Pass(scorer, engine_of(scorer), n_scored, who, at_once=at_once)
    if (parity := plan.scoring.parity) is not None:
        n_compared = min(n_test, parity.max_pairs or n_test)
        compared = parity.policies or plan.policies
        references = {plan.reference_of(policy) for policy in compared}
        at_once = min(plan.model_steps, len(compared))
        for name in (*map(plan.reference_of, compared), *references):
            yield _Pass(plan.scored_as(name), parity.engine, n_compared, at_once=at_once)


def _measure(plan: Plan) -> tuple[int, float, float]:
    """Pairs of all sources, and tokens of a prompt and of a reply, by their first rows."""
    n_pairs = 0.0
    prompts: list[int] = []
    replies: list[int] = []
    for name, config in {**plan.sources, **plan.evaluation}.items():
        reader = READERS[shape_of_source(name, config)]
        n_rows = n_sampled = 0
        n_units = 0.0
        for _, raw in raw_rows(name, config):
            n_rows += 1
            if n_rows > _SAMPLE_ROWS:
                continue
            n_sampled += 1
            for unit in _units(reader, raw, config):
                said = [unit.chosen, unit.rejected] if isinstance(unit, Unit) else [unit.completion]
                prompts.append(sum(len(message["content"]) for message in unit.prompt))
                replies += map(len, said)
                n_units += len(said) / 2  # of rivals in rows of their own, two make a pair
        n_pairs += n_rows * (n_units / n_sampled if n_sampled else 0.0)
    prompt, reply = (fmean(n) / _CHARACTERS_PER_TOKEN if n else 0.0 for n in (prompts, replies))
    return round(n_pairs), prompt + _TEMPLATE_TOKENS, reply


def _units(reader: Reader, row: RawRow, config: SourceConfig) -> list[Unit | Candidate]:
    try:
        read = reader(parse_row(row), config.options)
    except RowError:
        return []
    return [unit for unit in read if isinstance(unit, Unit | Candidate)]


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
