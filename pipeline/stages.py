"""The stages of a plan, each from published tables to published tables.

`intake.run_intake` comes first; then `tokenize`, `score` for every model, `train` and `score` for
every objective, `score` for every audit, `compute_rewards` and `write_report` for both; in the
order of `Plan.policies`, where an objective comes after those whose policies it needs. Every stage
can run again: what is there already is not computed twice.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl

from pipeline.errors import ScoringError
from pipeline.ids import content_id, unit_interval
from pipeline.landscape import answerable, landscape, landscape_png
from pipeline.losses import REGISTRY
from pipeline.models import load_tokenizer, resolve
from pipeline.names import (
    described,
    earlier_key,
    key_of,
    policy_id_of,
    reported_pairs,
    scored_by,
    wanted_extras,
    wanted_sequences,
)
from pipeline.plan import ObjectiveConfig, Plan, selection_of
from pipeline.report import RenderedReport, ReportInput, render
from pipeline.rewards import reward_table
from pipeline.rules import rule_table
from pipeline.scoring.ledger import (
    ScorerKey,
    last_trust,
    read_complete,
    read_extras,
    read_logprobs,
    read_unscored,
    recorded_difference,
    scorers,
)
from pipeline.scoring.run import ScoringResult, score_sequences, scorer_key
from pipeline.store import (
    Snapshot,
    Store,
    TableSnapshot,
    current_snapshot,
    is_published,
    publish,
    publish_file,
    publish_pieces,
    read,
    read_pieces,
)
from pipeline.tokenization import (
    Encoder,
    label_ways,
    pair_ways,
    require_same_tokenizer,
    sorted_rows,
)
from pipeline.training.data.kl_rows import kl_rows
from pipeline.training.data.preferences import read_preferences
from pipeline.training.objective import train_objective
from pipeline.training.policy import PolicyResult, trained_examples
from schemas import (
    AlignedReward,
    KlSequence,
    LabelSequence,
    LossLandscape,
    PairSequence,
    Reward,
    RuleCount,
    Scorer,
    Sequence,
    Tokenization,
    TrainingEvaluation,
    TrainingStep,
    UntokenizedLabel,
    UntokenizedPair,
    polars_schema,
)

_SHOWN = 20
"""Sequences that are named where many could be."""


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
    rules: pl.DataFrame
    kl_rows: dict[str, int]


@dataclass(frozen=True)
class ScoredRows:
    """What the ledger holds of the plan's sequences under one scorer.

    Attributes:
        n_rows: sequences.
        n_nonfinite: of them, those whose log-prob is not finite.
        mean: of the others, nats.
        digest: content id of ids and log-probs.
        unscored: the first of those that were tried in vain, each with what the engine said.
    """

    n_rows: int
    n_nonfinite: int
    mean: float
    digest: str
    unscored: dict[str, str]


@dataclass(frozen=True)
class LandscapeResult:
    """The published table, which losses are in it, and a picture."""

    table: TableSnapshot
    losses: list[str]
    png: bytes


@dataclass(frozen=True)
class ReportResult:
    """The published page and JSON, and what they say."""

    html: Path
    json: Path
    rendered: RenderedReport


def tokenize(plan: Plan, store: Store) -> TokenizeResult:
    """`pairs` to `sequences`, `pair_sequences`, `untokenized_pairs` and `tokenizations`.

    And `labels` to `label_sequences` and `untokenized_labels`, and `kl_sequences` for every
    objective whose loss has a KL term. The chat template is the plan's first model's; the others
    must share its tokeniser.

    Raises:
        ModelError: no usable tokeniser or template, or two models' tokenisers differ.
        TrainingError: a loss needs mismatched replies and there are no two prompts.
    """
    tokenizers = {
        name: load_tokenizer(resolve(config, store)) for name, config in plan.models.items()
    }
    require_same_tokenizer(tokenizers)
    encoder = Encoder(next(iter(tokenizers.values())), plan.tokenization)
    identity = encoder.identity()
    publish(store, "tokenizations", identity, Tokenization)
    n_pairs = n_tokens = 0

    def counted_pairs() -> Iterator[pl.DataFrame]:
        nonlocal n_pairs
        for piece in _limited_pieces(store, plan.limit_pairs):
            n_pairs += piece.height
            yield piece

    def counted(pieces: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        nonlocal n_tokens
        for piece in pieces:
            n_tokens += piece.select(pl.sum("n_prompt") + pl.sum("n_scored")).item()
            yield piece

    with sorted_rows(polars_schema(Sequence), store.directory) as rows:
        ways = pair_ways(counted_pairs(), encoder, rows.add)
        if is_published(store, "labels"):
            pieces = _limited_pieces(store, plan.limit_pairs, "labels", "label_id")
            labels = label_ways(pieces, encoder, rows.add)
            publish(store, "label_sequences", labels.ways, LabelSequence)
            publish(store, "untokenized_labels", labels.untokenized, UntokenizedLabel)
        sequences = publish_pieces(store, "sequences", counted(rows.pieces()), Sequence)
    pair_sequences = publish(store, "pair_sequences", ways.ways, PairSequence)
    kl = {
        name: kl_rows(
            read_preferences(store).read_by(objective),
            read(store, "sequences"),
            partner=objective.kl_partner,
            training=plan.training,
            max_length=plan.tokenization.max_length,
        )
        for name, objective in plan.objectives.items()
        if objective.kl_partner is not None
    }
    for name, table in kl.items():
        publish(store, f"kl_sequences/{name}", table, KlSequence)
    by_rule = dict(ways.untokenized["rule"].value_counts().sort("rule").iter_rows())
    found = {
        "boundary_merge": ways.ways.filter("boundary_merge").height,
        "control_tokens": ways.ways.filter(pl.col("control_tokens") > 0).height
        + by_rule.get("control_tokens", 0),
    }
    rules = rule_table(("tokenise",), {**by_rule, **found}, n_pairs, plan.actions, plan.limits)
    publish(store, "rule_counts/tokenise", rules, RuleCount)
    return TokenizeResult(
        n_pairs=n_pairs,
        sequences=sequences,
        pair_sequences=pair_sequences,
        untokenized=publish(store, "untokenized_pairs", ways.untokenized, UntokenizedPair),
        tokenization_id=identity["tokenization_id"][0],
        n_tokens=n_tokens,
        n_boundary_merges=found["boundary_merge"],
        untokenized_by_rule=by_rule,
        rules=rules,
        kl_rows={name: table.height for name, table in kl.items()},
    )


def score(plan: Plan, store: Store, name: str) -> ScoringResult:
    """Score what is wanted of a model or a trained policy of the plan.

    Raises:
        ScoringError: there is nothing to score; or see `score_sequences`.
    """
    config, checkpoint = scored_by(plan, store, name)
    sequences = wanted_sequences(plan, store, name)
    if sequences.is_empty():
        raise ScoringError(
            f"'{name}' has nothing to score: no pair was tokenised, nor a label that it reads"
        )
    result = None
    if plan.scoring.accept_equivalent is not None:
        result = _reused(plan, store, name, sequences, plan.scoring.accept_equivalent)
    if result is None:
        key = scorer_key(store, config, checkpoint)
        result = score_sequences(
            name,
            key,
            config,
            checkpoint,
            sequences,
            plan.scoring,
            extras=wanted_extras(plan, name),
        )
    publish(store, "scorers", scorers(store.ledger), Scorer)
    return result


def _reused(
    plan: Plan, store: Store, name: str, sequences: pl.DataFrame, most: float
) -> ScoringResult | None:
    """What earlier numerics hold, if a sample scored today differs by at most `most` nats.

    Where an audit's does not, its reference is scored in today's numerics as well, for its own
    sample may have been close enough.
    """
    config, checkpoint = scored_by(plan, store, name)
    key = scorer_key(store, config, checkpoint)
    earlier = earlier_key(plan, store, name)
    if earlier is not None:
        ids = sorted(sequences["sequence_id"], key=partial(unit_interval, salt="equivalent"))
        sample = sequences.filter(pl.col("sequence_id").is_in(ids[: plan.scoring.null_test_rows]))
        result = score_sequences(f"{name}, a sample", key, config, checkpoint, sample, plan.scoring)
        found = recorded_difference(key, earlier)
        if found is not None and found.largest <= most:
            n = sequences.height
            return replace(result, key=earlier, n_wanted=n, n_reused=n, n_scored=0, n_unscored=0)
    if name in plan.audits:
        against = plan.reference_of(name)
        reference, base = scored_by(plan, store, against)
        key = scorer_key(store, reference, base)
        score_sequences(against, key, reference, base, sequences, plan.scoring)
    return None


def scored_rows(plan: Plan, store: Store, name: str, key: ScorerKey) -> ScoredRows:
    """Read the ledger back and say what it holds of the sequences that were wanted.

    A sequence that lacks an extra the plan wants is not held.
    """
    wanted = wanted_sequences(plan, store, name).select("sequence_id")
    extras = wanted_extras(plan, name)
    tried = read_unscored(key, extras).join(wanted, on="sequence_id", how="semi").head(_SHOWN)
    held = read_complete(key, extras).join(wanted, on="sequence_id", how="semi")
    held = held.sort("sequence_id")
    said = [held["sequence_id"].to_list(), held["logprob"].to_list()]
    if extras:
        of_extras = read_extras(key).filter(pl.col("extra").is_in(extras))
        of_extras = of_extras.join(held, on="sequence_id", how="semi").sort("sequence_id", "extra")
        said += [of_extras["extra"].to_list(), of_extras["total"].to_list()]
    finite = held.filter(pl.col("logprob").is_finite())
    return ScoredRows(
        n_rows=held.height,
        n_nonfinite=held.height - finite.height,
        mean=float(finite["logprob"].sum()) / max(finite.height, 1),
        digest=content_id("scored", *said),
        unscored={
            row["sequence_id"]: f"{row['rule']}: {row['detail']}"
            for row in tried.iter_rows(named=True)
        },
    )


def train(plan: Plan, store: Store, name: str) -> PolicyResult:
    """Train the policy of an objective, find it trained, or keep the one it has.

    Publishes its training steps, and a pointer to it with the settings it was trained with.
    """
    result = train_objective(plan, store, name)
    publish(store, f"training_steps/{name}", result.steps, TrainingStep)
    publish(store, f"training_evaluations/{name}", result.evaluations, TrainingEvaluation)
    record = {"policy_id": result.policy_id, "settings": result.settings}
    pointer = json.dumps(record, sort_keys=True).encode()
    publish_file(store, f"policies/{name}", pointer, ".json")
    return result


def compute_rewards(plan: Plan, store: Store, name: str) -> TableSnapshot:
    """The implicit rewards of an objective's or an audit's policy against its reference."""
    reference, _ = key_of(plan, store, plan.reference_of(name))
    policy, _ = key_of(plan, store, name)
    statistics: dict[str, float] = {}
    if name in plan.audits:
        # Whatever it was trained with, it is looked at as DPO sees it.
        spec, values, identifier = (
            REGISTRY["dpo"],
            {"beta": plan.report.beta},
            policy.model.model_id,
        )
    else:
        objective = plan.objectives[name]
        spec, values, identifier = objective.spec, objective.values, policy_id_of(store, name)
        # KTO's weights depend on a reference point; the one the policy was last trained with.
        if (last := read(store, f"training_steps/{name}")["kl"][-1]) is not None:
            statistics["kl"] = last
    aligned = "log_sum_squares" in wanted_extras(plan, name)
    table = reward_table(
        read(store, "pairs"),
        reported_pairs(plan, store),
        read_logprobs(reference),
        read_logprobs(policy),
        beta=plan.report.beta,
        spec=spec,
        values=values,
        statistics=statistics,
        policy_id=identifier,
        pairs_digest=current_snapshot(store, "pairs").digest,
        noise_floor=_noise_floor(reference, policy),
        extras=read_extras(policy) if aligned else None,
    )
    return publish(store, f"rewards/{name}", table, AlignedReward if aligned else Reward)


def compute_landscape(plan: Plan, store: Store) -> LandscapeResult:
    """Every policy of the plan, as it is, under the losses and settings the plan asks for.

    KTO is asked only where the policy's training has measured its reference point, WPO only where
    policies are scored with `log_sum_squares` (`scoring.token_extras`).

    Raises:
        LossInputError: a loss the plan names needs numbers that the tables do not have.
    """
    config = plan.report.landscape
    strengths = read(store, "pairs").select("pair_id", "strength")
    tables = [pl.DataFrame(schema=polars_schema(LossLandscape))]
    for name in plan.policies:
        rewards = read(store, f"rewards/{name}").join(strengths, on="pair_id", how="left")
        if rewards.is_empty():  # trained on labels alone, and asked about no pair
            continue
        if rewards["strength"].null_count():
            rewards = rewards.drop("strength")
        known: dict[str, float] = {}
        if name in plan.objectives and plan.objectives[name].spec.needs_kl:
            known["kl"] = read(store, f"training_steps/{name}")["kl"][-1]
        asked = config.losses or answerable(rewards.columns, known)
        grid = {
            parameter: values
            for parameter, values in config.grid.items()
            if any(parameter in REGISTRY[loss].parameters for loss in asked)
        }
        found = landscape(rewards, asked, grid, statistics=known)
        ids = {
            "policy": name,
            "policy_id": rewards["policy_id"].first(),
            "rewards_digest": current_snapshot(store, f"rewards/{name}").digest,
        }
        tables.append(found.select(*(pl.lit(v).alias(k) for k, v in ids.items()), pl.all()))
    table = pl.concat(tables)
    own = [o.loss for o in plan.objectives.values() if isinstance(o.loss, str)]
    losses = table["loss"].unique(maintain_order=True).to_list()
    png = landscape_png(table, list(dict.fromkeys([*own, "dpo", "ipo", "simpo", *losses])))
    return LandscapeResult(publish(store, "loss_landscape", table, LossLandscape), losses, png)


def n_reported(plan: Plan, store: Store) -> int:
    """How many pairs policies are reported on, and so must have a reward."""
    return reported_pairs(plan, store).height


def write_report(plan: Plan, store: Store, name: str) -> ReportResult:
    """The report of an objective's or an audit's policy, as HTML and JSON."""
    against = plan.reference_of(name)
    reference, _ = key_of(plan, store, against)
    policy, _ = key_of(plan, store, name)
    pairs, rewards = read(store, "pairs"), read(store, f"rewards/{name}")
    ways = read(store, "pair_sequences")
    identities = {
        "plan": plan.name,
        "plan digest": plan.digest,
        "pairs": current_snapshot(store, "pairs").digest,
        "rewards": current_snapshot(store, f"rewards/{name}").digest,
        "tokenisation": read(store, "tokenizations")["tokenization_id"][0],
        "reference": described(plan, store, against),
        "reference model id": reference.model.model_id,
        "policy model id": policy.model.model_id,
        "numerics id": reference.numerics.numerics_id,
        "engine": f"{reference.numerics.engine} {reference.numerics.engine_version}, "
        f"{reference.numerics.body_dtype}, {reference.numerics.device_class}",
    }
    if name in plan.audits:
        identities["policy"] = described(plan, store, plan.audits[name].policy)
        loss, has_reference = {}, True
        steps = pl.DataFrame(schema=polars_schema(TrainingStep))
    else:
        identities |= {"policy id": policy_id_of(store, name), "seed": str(plan.training.seed)}
        objective = plan.objectives[name]
        identities["start"] = described(plan, store, objective.start)
        loss, has_reference = _loss(objective), objective.spec.needs_reference
        steps = read(store, f"training_steps/{name}")
    left_out = pairs.height - _limited(pairs, plan.limit_pairs).height
    left_out += ways.height - reported_pairs(plan, store).height
    rendered = render(
        ReportInput(
            title=f"{name}: implicit rewards",
            plan=plan.name,
            objective=name,
            loss=loss,
            has_reference=has_reference,
            rewards=rewards,
            pairs=pairs,
            rows=read(store, "rows"),
            quarantine=read(store, "quarantine"),
            untokenized=read(store, "untokenized_pairs"),
            training_steps=steps,
            training_pairs=_fitted(plan, store, name, pairs, ways),
            provenance=identities,
            noise_floor=_noise_floor(reference, policy),
            n_left_out=left_out,
        )
    )
    html = publish_file(store, f"reports/{name}", rendered.html.encode(), ".html")
    numbers = publish_file(store, f"reports/{name}", rendered.json.encode(), ".json")
    return ReportResult(_pointer(store, name, html), _pointer(store, name, numbers), rendered)


def _fitted(
    plan: Plan, store: Store, name: str, pairs: pl.DataFrame, ways: pl.DataFrame
) -> pl.DataFrame:
    """What the report's baselines learn from: what the policy did, if pairs were selected."""
    found = pairs.filter(split="train").join(ways, on="pair_id", how="semi")
    if name in plan.audits or selection_of(plan, name).where is None:
        return found
    trained = trained_examples(store, policy_id_of(store, name))
    return found.join(trained, left_on="pair_id", right_on="example_id", how="semi")


def _loss(objective: ObjectiveConfig) -> dict[str, str]:
    """What a policy was trained with, as a report shows it."""
    target = objective.spec.target(objective.values)
    return {
        "loss": objective.spec.name,
        **{key: f"{value:g}" for key, value in objective.values.items()},
        "target": "none, it always asks for more" if target is None else str(target),
        "paper": objective.spec.paper,
    }


def _limited(pairs: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """At most `limit` pairs, always the same ones, whatever else is in the table."""
    if limit is None or pairs.height <= limit:
        return pairs
    return pairs.filter(pl.col("pair_id").is_in(_kept(pairs["pair_id"], limit)))


def _limited_pieces(
    store: Store, limit: int | None, table: str = "pairs", key: str = "pair_id"
) -> Iterator[pl.DataFrame]:
    """The same pairs (or labels), some at a time."""
    kept = None
    if limit is not None:
        ids = [piece[key] for piece in read_pieces(store, table, columns=[key])]
        kept = _kept(pl.concat([pl.Series(key, [], pl.String), *ids]), limit)
    for piece in read_pieces(store, table):
        yield piece if kept is None else piece.filter(pl.col(key).is_in(kept))


def _kept(ids: pl.Series, limit: int) -> list[str]:
    return sorted(ids, key=partial(unit_interval, salt="limit"))[:limit]


def _noise_floor(*keys: ScorerKey) -> float | None:
    """The larger of the models' noise floors, or None if one was not measured."""
    records = [last_trust(key) for key in keys]
    floors = [record["noise_floor"] for record in records if record is not None]
    return max(floors) if len(floors) == len(keys) else None


def _pointer(store: Store, name: str, snapshot: Snapshot) -> Path:
    return store.current(f"reports/{name}", snapshot.path.suffix)
