"""Pairs and labels to sequences."""

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from pipeline.models import load_tokenizer, resolve
from pipeline.plan import Plan
from pipeline.rules import rule_table
from pipeline.stages.common import limited_pieces
from pipeline.store import (
    Store,
    TableSnapshot,
    is_published,
    publish,
    publish_pieces,
    read,
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
from schemas import (
    KlSequence,
    LabelSequence,
    PairSequence,
    RuleCount,
    Sequence,
    Tokenization,
    UntokenizedLabel,
    UntokenizedPair,
    polars_schema,
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
    rules: pl.DataFrame
    kl_rows: dict[str, int]


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
        for piece in limited_pieces(store, plan.limit_pairs):
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
            pieces = limited_pieces(store, plan.limit_pairs, "labels", "label_id")
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
