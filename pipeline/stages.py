"""The stages of a plan, each from published tables to published tables.

`intake.run_intake` comes first; then `tokenize`, `score` for every model, `train` and `score` for
every objective, `compute_rewards` and `write_report`. Every stage can run again: what is there
already is not computed twice.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from pipeline import losses
from pipeline.errors import StoreError
from pipeline.ids import content_id, unit_interval
from pipeline.models import Checkpoint, load_tokenizer, resolve
from pipeline.plan import ModelConfig, ObjectiveConfig, Plan
from pipeline.report import RenderedReport, ReportInput, render
from pipeline.rewards import reward_table
from pipeline.scoring.ledger import ScorerKey, last_trust, read_logprobs, scorers
from pipeline.scoring.run import ScoringResult, score_sequences, scorer_key
from pipeline.store import (
    Snapshot,
    Store,
    TableSnapshot,
    current_snapshot,
    publish,
    publish_file,
    read,
)
from pipeline.tokenization import Encoder, require_same_tokenizer, tokenize_pairs
from pipeline.training.batches import training_pairs
from pipeline.training.policy import PolicyResult, train_policy
from schemas import (
    PairSequence,
    Reward,
    Scorer,
    Sequence,
    Tokenization,
    TrainingStep,
    UntokenizedPair,
)


@dataclass(frozen=True)
class TokenizeResult:
    """The published tables; `n_pairs = pair_sequences + untokenized` is the stage's law."""

    n_pairs: int
    sequences: TableSnapshot
    pair_sequences: TableSnapshot
    untokenized: TableSnapshot
    tokenization_id: str
    n_tokens: int
    n_boundary_merges: int
    untokenized_by_rule: dict[str, int]


@dataclass(frozen=True)
class ScoredRows:
    """What the ledger holds of the plan's sequences under one scorer; the mean is in nats."""

    n_rows: int
    n_nonfinite: int
    mean: float
    digest: str


@dataclass(frozen=True)
class ReportResult:
    """The published page and JSON, and what they say."""

    html: Path
    json: Path
    rendered: RenderedReport


def store_of(plan: Plan) -> Store:
    """Where the plan's tables are."""
    return Store(plan.store, plan.name)


def tokenize(plan: Plan, store: Store) -> TokenizeResult:
    """`pairs` to `sequences`, `pair_sequences`, `untokenized_pairs` and `tokenizations`.

    The chat template is the plan's first model's; the others must share its tokeniser.

    Raises:
        ModelError: no usable tokeniser or template, or two models' tokenisers differ.
    """
    tokenizers = {
        name: load_tokenizer(resolve(config, store)) for name, config in plan.models.items()
    }
    require_same_tokenizer(tokenizers)
    encoder = Encoder(next(iter(tokenizers.values())), plan.tokenization)
    pairs = _limited(read(store, "pairs"), plan.limit_pairs)
    tables = tokenize_pairs(pairs, encoder)
    publish(store, "tokenizations", tables.tokenization, Tokenization)
    rules = tables.untokenized["rule"].value_counts().sort("rule")
    return TokenizeResult(
        n_pairs=pairs.height,
        sequences=publish(store, "sequences", tables.sequences, Sequence),
        pair_sequences=publish(store, "pair_sequences", tables.pair_sequences, PairSequence),
        untokenized=publish(store, "untokenized_pairs", tables.untokenized, UntokenizedPair),
        tokenization_id=tables.tokenization["tokenization_id"][0],
        n_tokens=tables.sequences.select(pl.sum("n_prompt") + pl.sum("n_scored")).item(),
        n_boundary_merges=tables.pair_sequences.filter("boundary_merge").height,
        untokenized_by_rule=dict(rules.iter_rows()),
    )


def score(plan: Plan, store: Store, name: str) -> ScoringResult:
    """Score every sequence under a model or a trained policy of the plan."""
    config, checkpoint = _scored_by(plan, store, name)
    key = scorer_key(store, config, checkpoint)
    sequences = read(store, "sequences")
    result = score_sequences(name, key, config, checkpoint, sequences, plan.scoring)
    publish(store, "scorers", scorers(store.ledger), Scorer)
    return result


def scored_rows(store: Store, key: ScorerKey) -> ScoredRows:
    """Read the ledger back and say what it holds of the plan's sequences."""
    wanted = read(store, "sequences").select("sequence_id")
    held = read_logprobs(key).join(wanted, on="sequence_id", how="semi").sort("sequence_id")
    finite = held.filter(pl.col("logprob").is_finite())
    return ScoredRows(
        n_rows=held.height,
        n_nonfinite=held.height - finite.height,
        mean=float(finite["logprob"].sum()) / max(finite.height, 1),
        digest=content_id("scored", held["sequence_id"].to_list(), held["logprob"].to_list()),
    )


def train(plan: Plan, store: Store, name: str) -> PolicyResult:
    """Train the policy of an objective, or find it trained; publish its training steps."""
    objective = plan.objectives[name]
    reference, _ = key_of(plan, store, objective.reference)
    start, checkpoint = key_of(plan, store, objective.start)
    pairs = training_pairs(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read(store, "sequences"),
        read_logprobs(reference),
    )
    result = train_policy(
        store,
        name,
        objective,
        plan.training,
        plan.models[objective.start],
        checkpoint,
        start,
        reference,
        pairs,
        read_logprobs(start),
        plan.scoring.tolerance(plan.models[objective.start].dtype),
    )
    publish(store, f"training_steps/{name}", result.steps, TrainingStep)
    pointer = json.dumps({"policy_id": result.policy_id}).encode()
    publish_file(store, f"policies/{name}", pointer, ".json")
    return result


def compute_rewards(plan: Plan, store: Store, name: str) -> TableSnapshot:
    """The implicit rewards of an objective's policy against its reference."""
    objective = plan.objectives[name]
    reference, _ = key_of(plan, store, objective.reference)
    policy, _ = key_of(plan, store, name)
    spec = losses.REGISTRY[objective.loss]
    table = reward_table(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read_logprobs(reference),
        read_logprobs(policy),
        beta=plan.report.beta,
        score=lambda ratio, logprob, n: spec.score(ratio, logprob, n, objective.beta),
        gradient_weight=spec.gradient_weight,
        policy_id=_policy_id(store, name),
        pairs_digest=current_snapshot(store, "pairs").digest,
    )
    return publish(store, f"rewards/{name}", table, Reward)


def n_tokenized(store: Store) -> int:
    """How many pairs were tokenised, and so must have a reward."""
    return read(store, "pair_sequences").height


def write_report(plan: Plan, store: Store, name: str) -> ReportResult:
    """The report of an objective's policy, as HTML and JSON."""
    objective = plan.objectives[name]
    reference, _ = key_of(plan, store, objective.reference)
    policy, _ = key_of(plan, store, name)
    pairs, rewards = read(store, "pairs"), read(store, f"rewards/{name}")
    spec = losses.REGISTRY[objective.loss]
    identities = {
        "plan": plan.name,
        "plan digest": plan.digest,
        "pairs": current_snapshot(store, "pairs").digest,
        "rewards": current_snapshot(store, f"rewards/{name}").digest,
        "tokenisation": read(store, "tokenizations")["tokenization_id"][0],
        "reference": f"{objective.reference}: {_shown(plan.models[objective.reference])}",
        "reference model id": reference.model.model_id,
        "policy id": _policy_id(store, name),
        "policy model id": policy.model.model_id,
        "numerics id": reference.numerics.numerics_id,
        "engine": f"{reference.numerics.engine} {reference.numerics.engine_version}, "
        f"{reference.numerics.body_dtype}, {reference.numerics.device_class}",
        "seed": str(plan.training.seed),
    }
    rendered = render(
        ReportInput(
            title=f"{name}: implicit rewards",
            plan=plan.name,
            objective=name,
            loss={"loss": objective.loss, "beta": f"{objective.beta:g}", "paper": spec.paper},
            rewards=rewards,
            pairs=pairs,
            rows=read(store, "rows"),
            quarantine=read(store, "quarantine"),
            untokenized=read(store, "untokenized_pairs"),
            training_steps=read(store, f"training_steps/{name}"),
            provenance=identities,
            noise_floor=_noise_floor(reference, policy),
            n_left_out=pairs.height - _limited(pairs, plan.limit_pairs).height,
        )
    )
    html = publish_file(store, f"reports/{name}", rendered.html.encode(), ".html")
    numbers = publish_file(store, f"reports/{name}", rendered.json.encode(), ".json")
    return ReportResult(_pointer(store, name, html), _pointer(store, name, numbers), rendered)


def _limited(pairs: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """At most `limit` pairs, always the same ones, whatever else is in the table."""
    if limit is None or pairs.height <= limit:
        return pairs
    kept = sorted(pairs["pair_id"], key=partial(unit_interval, salt="limit"))[:limit]
    return pairs.filter(pl.col("pair_id").is_in(kept))


def _scored_by(plan: Plan, store: Store, name: str) -> tuple[ModelConfig, Checkpoint]:
    """The checkpoint behind a name: a model's, or the policy an objective has trained."""
    if name in plan.models:
        return plan.models[name], resolve(plan.models[name], store)
    objective: ObjectiveConfig = plan.objectives[name]
    config = plan.models[objective.start]
    directory = store.policies / _policy_id(store, name)
    if not directory.exists():
        raise StoreError(f"{directory}: the policy of objective '{name}' is missing; train it")
    return config, Checkpoint(resolve(config, store).path, directory)


def key_of(plan: Plan, store: Store, name: str) -> tuple[ScorerKey, Checkpoint]:
    """Who scores under a name: a model, or an objective's policy; and its checkpoint."""
    config, checkpoint = _scored_by(plan, store, name)
    return scorer_key(store, config, checkpoint), checkpoint


def _policy_id(store: Store, name: str) -> str:
    pointer = current_snapshot(store, f"policies/{name}", ".json").path
    return str(json.loads(pointer.read_text())["policy_id"])


def _noise_floor(*keys: ScorerKey) -> float | None:
    """The larger of the models' noise floors, or None if one was not measured."""
    records = [last_trust(key) for key in keys]
    floors = [record["noise_floor"] for record in records if record is not None]
    return max(floors) if len(floors) == len(keys) else None


def _shown(config: ModelConfig) -> str:
    """A checkpoint's name without the machine it is on."""
    return Path(config.checkpoint).name if Path(config.checkpoint).exists() else config.checkpoint


def _pointer(store: Store, name: str, snapshot: Snapshot) -> Path:
    return store.current(f"reports/{name}", snapshot.path.suffix)
