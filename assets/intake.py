"""Assets of the intake: pairs and the rows that were not accepted, then token sequences."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import polars as pl

from assets.metadata import column_schema, counts_markdown, examples_markdown, table_metadata
from assets.resources import opened, resource_key, tag_run
from pipeline import stages
from pipeline.errors import SourceError
from pipeline.intake import IntakeResult, run_intake, sources_digest
from pipeline.plan import Plan
from schemas import PreferenceLabel, PreferencePair, QuarantinedRow, Sequence, Table

GROUP = "intake"
LIMITS = "rules_stay_within_their_limits"


def _observed(**arguments: Any) -> Callable[..., Any]:
    """Dagster's decorator without its warning: it is beta, and the lock pins the version."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=dg.BetaWarning)
        decorator: Callable[..., Any] = dg.multi_observable_source_asset(**arguments)
    return decorator


def raw_preferences(plan: Plan) -> dg.AssetsDefinition:
    """The source files, which we observe and never write; their version is their content."""
    key = dg.AssetKey([plan.name, "raw_preferences"])

    @_observed(
        name=f"{plan.name}_raw",
        specs=[
            dg.AssetSpec(
                key,
                kinds={"json"},
                description="Preference data as it was published: the files the plan names.",
                metadata={name: str(config.path) for name, config in plan.sources.items()},
            )
        ],
        group_name=GROUP,
        required_resource_keys={resource_key(plan.name)},
    )
    def observed(context: dg.AssetExecutionContext) -> Iterator[dg.ObserveResult]:
        run_plan, _ = opened(context, plan.name)
        tag_run(context, plan.name, run_plan)
        digest = sources_digest(run_plan)
        yield dg.ObserveResult(
            asset_key=key, data_version=dg.DataVersion(digest), metadata={"digest": digest}
        )

    definition: dg.AssetsDefinition = observed
    return definition


def preference_pairs(plan: Plan) -> dg.AssetsDefinition:
    """Assets for the valid pairs, the labels and the rejected rows, made by one step."""
    raw = dg.AssetKey([plan.name, "raw_preferences"])
    pairs = dg.AssetKey([plan.name, "preference_pairs"])
    labels = dg.AssetKey([plan.name, "preference_labels"])
    quarantine = dg.AssetKey([plan.name, "quarantined_rows"])
    said: tuple[tuple[dg.AssetKey, str, type[Table]], ...] = (
        (pairs, "One row is a distinct valid preference pair.", PreferencePair),
        (labels, "One row is a distinct valid labelled completion.", PreferenceLabel),
        (
            quarantine,
            "One row is an input row that was rejected, with the rule it broke.",
            QuarantinedRow,
        ),
    )

    @dg.multi_asset(
        name=f"{plan.name}_intake",
        specs=[
            dg.AssetSpec(
                key,
                deps=[raw],
                description=description,
                kinds={"polars", "parquet"},
                metadata={"dagster/column_schema": column_schema(model)},
            )
            for key, description, model in said
        ],
        group_name=GROUP,
        check_specs=[
            dg.AssetCheckSpec("every_row_is_accounted_for", asset=pairs, blocking=True),
            dg.AssetCheckSpec("no_prompt_is_in_two_splits", asset=pairs, blocking=True),
            dg.AssetCheckSpec(
                "no_training_prompt_is_near_an_evaluated_one", asset=pairs, blocking=True
            ),
            dg.AssetCheckSpec(LIMITS, asset=quarantine, blocking=True),
        ],
        required_resource_keys={resource_key(plan.name)},
    )
    def intake(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        run_plan, store = opened(context, plan.name)
        try:
            result = run_intake(run_plan, store)
        except SourceError as error:  # data will not mend itself by trying again
            raise dg.Failure(str(error), allow_retries=False) from error
        yield dg.MaterializeResult(
            asset_key=pairs,
            data_version=dg.DataVersion(result.pairs.digest),
            metadata={
                **table_metadata(result.pairs, "pairs"),
                **{f"pairs_{split}": n for split, n in result.pairs_by_split.items()},
                "flags": counts_markdown(result.flags, "no pair is flagged"),
                **{f"auc/{row['feature']}": row["auc"] for row in result.confounds.to_dicts()},
            },
            check_results=_pair_checks(pairs, run_plan, result),
        )
        yield dg.MaterializeResult(
            asset_key=labels,
            data_version=dg.DataVersion(result.labels.digest),
            metadata=table_metadata(result.labels, "labels"),
        )
        yield dg.MaterializeResult(
            asset_key=quarantine,
            data_version=dg.DataVersion(result.quarantine.digest),
            metadata={
                **table_metadata(result.quarantine, "quarantine"),
                "by_rule": counts_markdown(result.quarantined_by_rule, "nothing was quarantined"),
                "examples": examples_markdown(result.examples, "nothing was quarantined"),
                **_rule_numbers(result.rules),
            },
            check_results=[_limits_check(quarantine, result.rules)],
        )

    return intake


def _pair_checks(key: dg.AssetKey, plan: Plan, result: IntakeResult) -> list[dg.AssetCheckResult]:
    flagged = plan.actions["near_eval"] == "flag"  # who says so wants to train on them all the same
    return [
        dg.AssetCheckResult(
            asset_key=key,
            check_name="every_row_is_accounted_for",
            passed=result.law["holds"].all(),
            metadata={
                f"{row['source']}_{column}": row[column]
                for row in result.law.to_dicts()
                for column in ("n_in", "n_accepted", "n_merged", "n_quarantined")
            },
        ),
        dg.AssetCheckResult(
            asset_key=key,
            check_name="no_prompt_is_in_two_splits",
            passed=result.prompts_in_two_splits == 0,
            metadata={"prompts": result.prompts_in_two_splits},
        ),
        dg.AssetCheckResult(
            asset_key=key,
            check_name="no_training_prompt_is_near_an_evaluated_one",
            passed=result.trained_near_eval == 0,
            severity=dg.AssetCheckSeverity.WARN if flagged else dg.AssetCheckSeverity.ERROR,
            metadata={
                "trained_on_all_the_same": result.trained_near_eval,
                "action": plan.actions["near_eval"],
            },
        ),
    ]


def _rule_numbers(rules: pl.DataFrame) -> dict[str, int]:
    """A number for every rule, always for all of them, so that Dagster draws them over time."""
    return {f"rule/{row['rule']}": row["n"] for row in rules.to_dicts()}


def _limits_check(key: dg.AssetKey, rules: pl.DataFrame) -> dg.AssetCheckResult:
    limited = rules.filter(pl.col("at_most").is_not_null())
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=LIMITS,
        passed=limited["holds"].all(),
        metadata={
            row["rule"]: f"{row['share']:.4f} of them, at most {row['at_most']:g}"
            for row in limited.to_dicts()
        },
    )


def sequences(plan: Plan) -> dg.AssetsDefinition:
    """Token ids, each distinct sequence once."""

    @dg.asset(
        key=[plan.name, "sequences"],
        deps=[dg.AssetKey([plan.name, f"preference_{kind}"]) for kind in ("pairs", "labels")],
        group_name=GROUP,
        kinds={"huggingface", "parquet"},
        description="One row is a distinct (prompt ids, completion ids, scored spans).",
        metadata={"dagster/column_schema": column_schema(Sequence)},
        check_specs=[
            dg.AssetCheckSpec(
                "every_pair_is_tokenised_or_listed",
                asset=[plan.name, "sequences"],
                blocking=True,
            ),
            dg.AssetCheckSpec(LIMITS, asset=[plan.name, "sequences"], blocking=True),
        ],
        required_resource_keys={resource_key(plan.name)},
    )
    def tokenised(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        result = stages.tokenize(*opened(context, plan.name))
        covered = result.pair_sequences.n_rows + result.untokenized.n_rows
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.sequences.digest),
            metadata={
                **table_metadata(result.sequences, "sequences"),
                "pairs": result.pair_sequences.n_rows,
                "tokens": result.n_tokens,
                "pairs_with_boundary_merge": result.n_boundary_merges,
                "tokenization_id": result.tokenization_id,
                **{f"kl_rows_{name}": n for name, n in result.kl_rows.items()},
                **_rule_numbers(result.rules),
                "untokenised_by_rule": counts_markdown(
                    result.untokenized_by_rule, "every pair was tokenised"
                ),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="every_pair_is_tokenised_or_listed",
                    passed=covered == result.n_pairs,
                    metadata={
                        "pairs": result.n_pairs,
                        "tokenised": result.pair_sequences.n_rows,
                        "listed": result.untokenized.n_rows,
                    },
                ),
                _limits_check(dg.AssetKey([plan.name, "sequences"]), result.rules),
            ],
        )

    return tokenised
