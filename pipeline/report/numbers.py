"""Every number of a report, as plain values a JSON file can hold (no NaN, no infinity)."""

import json
import math
from typing import Any

import polars as pl

from pipeline.report.baselines import baselines
from pipeline.report.histogram import margin_histogram
from pipeline.report.inputs import ReportInput, finite_rows, ordered
from pipeline.rewards import accuracy, correct, margin_noise
from schemas.intake import DISPOSITIONS, SPLITS

_STEP_NUMBERS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen")
_ROW = ["source", "file", "row"]


def report_numbers(inp: ReportInput) -> dict[str, Any]:
    """The report's numbers. Rewards and margins are beta x nats, log-ratios and the floor nats.

    Rows of `rewards` with a number that is not finite are counted and left out of every statistic.
    The keys are `rows`, `quarantined_by_rule`, `untokenized_by_rule`, `pairs`, `splits` (`all` and
    each split), `held_out_split`, `baselines`, `categories`, `training`, `noise`, `histogram`,
    `finite`, and what names the report.

    Raises:
        ReportError: the tables do not belong together (`pipeline.report.inputs.ordered`).
    """
    inp = ordered(inp)
    rewards = finite_rows(inp.rewards)
    beta = rewards.item(0, "beta") if rewards.height else None
    noise = _noise(inp.noise_floor, beta)
    held_out = next((s for s in ("test", "evaluation") if s in set(rewards["split"])), None)
    judged = rewards if held_out is None else rewards.filter(split=held_out)
    splits = {
        name: _split_numbers(
            rewards if name == "all" else rewards.filter(split=name), noise["margin"]
        )
        for name in ("all", *SPLITS)
    }
    return {
        "title": inp.title,
        "plan": inp.plan,
        "objective": inp.objective,
        "loss": dict(inp.loss),
        "beta": beta,
        "rows": _row_numbers(inp.rows, inp.quarantine),
        "quarantined_by_rule": _by_rule(inp.quarantine),
        "untokenized_by_rule": _by_rule(inp.untokenized),
        "pairs": _pair_numbers(inp),
        "held_out_split": held_out,
        "baselines": baselines(judged, inp.pairs, inp.training_pairs),
        "splits": splits,
        "categories": _categories(judged, inp.pairs),
        "training": _training_numbers(inp.training_steps, noise["margin"], inp.has_reference),
        "noise": noise,
        "histogram": margin_histogram(
            {name: rewards.filter(split=name)["margin"].to_numpy() for name in SPLITS}
        ),
        "finite": {"n": inp.rewards.height, "n_nonfinite": inp.rewards.height - rewards.height},
        "provenance": dict(inp.provenance),
    }


def report_json(numbers: dict[str, Any]) -> str:
    """The numbers as JSON text, the same text for the same numbers.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(numbers, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _row_numbers(rows: pl.DataFrame, quarantine: pl.DataFrame) -> dict[str, Any]:
    """Rows by fate. `n_in` counts rows of the files, the fates count rows of the table.

    So the law `n_in = accepted + merged + quarantined` fails for a row with two fates or none.
    """
    by_source = [
        {"source": source, **_fates(part)}
        for (source,), part in rows.group_by("source", maintain_order=True)
    ]
    rejected = rows.filter(disposition="quarantined")
    return {
        "total": _fates(rows),
        "by_source": by_source,
        "n_without_reason": rejected.join(quarantine, on=_ROW, how="anti").height,
    }


def _fates(rows: pl.DataFrame) -> dict[str, Any]:
    counts = {fate: rows.filter(disposition=fate).height for fate in DISPOSITIONS}
    n_in = rows.select(_ROW).n_unique()
    return {"n_in": n_in, **counts, "law_holds": n_in == sum(counts.values())}


def _by_rule(frame: pl.DataFrame) -> list[dict[str, Any]]:
    counts = frame.group_by("rule").len("n").sort(["n", "rule"], descending=[True, False])
    return counts.to_dicts()


def _pair_numbers(inp: ReportInput) -> dict[str, Any]:
    scored = inp.rewards.select("pair_id")
    refused = inp.untokenized.select("pair_id").unique()
    lost = inp.pairs.join(scored, on="pair_id", how="anti").join(refused, on="pair_id", how="anti")
    return {
        "n": inp.pairs.height,
        "n_prompts": inp.pairs["prompt_id"].n_unique(),
        "by_split": {split: inp.pairs.filter(split=split).height for split in SPLITS},
        "n_scored": scored.height,
        "n_untokenized": refused.height,
        "n_left_out": inp.n_left_out,
        "n_unaccounted": lost.height - inp.n_left_out,
    }


def _split_numbers(rewards: pl.DataFrame, noise_margin: float | None) -> dict[str, Any]:
    """Statistics of some pairs; None where there are no pairs to speak of."""
    agreed = accuracy(rewards)
    longer = rewards.select(
        pl.when(pl.col("n_chosen") == pl.col("n_rejected"))
        .then(0.5)
        .otherwise((pl.col("n_chosen") > pl.col("n_rejected")).cast(pl.Float64))
    ).to_series()
    within = None
    if noise_margin is not None:
        within = rewards.filter(pl.col("margin").abs() <= noise_margin).height
    return {
        "n": agreed.n,
        "n_prompts": agreed.n_prompts,
        "n_ties": agreed.n_ties,
        "accuracy": agreed.mean,
        "accuracy_low": agreed.low,
        "accuracy_high": agreed.high,
        "own_score_accuracy": _mean(
            rewards.select(
                correct(pl.col("objective_score_chosen") - pl.col("objective_score_rejected"))
            ).to_series()
        ),
        "length_only_accuracy": _mean(longer),
        "margin_mean": _mean(rewards["margin"]),
        "margin_median": _quantile(rewards["margin"], 0.5),
        "margin_p05": _quantile(rewards["margin"], 0.05),
        "margin_p95": _quantile(rewards["margin"], 0.95),
        "n_within_noise": within,
        "reward_chosen_mean": _mean(rewards["reward_chosen"]),
        "reward_rejected_mean": _mean(rewards["reward_rejected"]),
        "logratio_chosen_mean": _mean(rewards["logratio_chosen"]),
        "logratio_rejected_mean": _mean(rewards["logratio_rejected"]),
        "displaced_share": _mean((rewards["logratio_chosen"] < 0).cast(pl.Float64)),
        "tokens_chosen_mean": _mean(rewards["n_chosen"]),
        "tokens_rejected_mean": _mean(rewards["n_rejected"]),
    }


def _categories(rewards: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, Any]:
    """Agreement by the string under "category" in a pair's `meta`."""
    held = rewards.join(pairs.select("pair_id", "meta"), on="pair_id", how="left")
    named = held.with_columns(
        category=pl.Series([_category(meta) for meta in held["meta"]], dtype=pl.String)
    ).filter(pl.col("category").is_not_null())
    rows = []
    for (category,), part in named.sort("category", "pair_id").group_by(
        "category", maintain_order=True
    ):
        agreed = accuracy(part)
        rows.append(
            {
                "category": category,
                "n": agreed.n,
                "accuracy": agreed.mean,
                "accuracy_low": agreed.low,
                "accuracy_high": agreed.high,
                "margin_mean": _mean(part["margin"]),
            }
        )
    return {"rows": rows, "n_without": held.height - named.height}


def _category(meta: str | None) -> str | None:
    try:
        value = json.loads(meta or "{}")
    except (ValueError, RecursionError):
        return None
    category = value.get("category") if isinstance(value, dict) else None
    return category if isinstance(category, str) else None


def _training_numbers(
    steps: pl.DataFrame, noise_margin: float | None, has_reference: bool
) -> dict[str, Any] | None:
    """First and last step; both are of a batch before its update."""
    if steps.is_empty():
        return None
    floats = [name for name, dtype in steps.schema.items() if dtype.is_float()]
    first, last = (
        {"step": row["step"], **{name: _finite(row[name]) for name in _STEP_NUMBERS}}
        for row in (steps.row(0, named=True), steps.row(-1, named=True))
    )
    return {
        "n_steps": steps.height,
        # A null is a number the step has none of: of labels there is no margin.
        "n_nonfinite": steps.filter(
            pl.any_horizontal(~pl.col(name).is_finite().fill_null(value=True) for name in floats)
        ).height,
        "first": first,
        "last": last,
        "starts_at_reference": _start(steps.row(0, named=True), noise_margin)
        if has_reference
        else "has_none",
    }


def _start(first: dict[str, float | None], noise_margin: float | None) -> str:
    """Whether the untrained policy was the reference: every margin 0, every pair a tie.

    Of a step of labels, which has no margin: whether the mean rewards are 0.
    """
    if first["rewards/margins"] is None:
        rewards = [first[f"rewards/{side}"] for side in ("chosen", "rejected")]
        return "exactly" if {0.0} == {r for r in rewards if r is not None} else "no"
    margin, agreed = (_finite(first[f"rewards/{name}"]) for name in ("margins", "accuracies"))
    if margin == 0 and agreed == 0.5:
        return "exactly"
    if margin is not None and noise_margin is not None and abs(margin) <= noise_margin:
        return "within_noise"
    return "no"


def _noise(floor: float | None, beta: float | None) -> dict[str, float | None]:
    """The floor in nats, and the most it can move a margin."""
    return {"nats": floor, "margin": margin_noise(floor, beta)}


def _mean(values: pl.Series) -> float | None:
    # fsum rounds once, so the order and the chunks of a frame cannot show in the last digit.
    return math.fsum(values) / len(values) if len(values) else None


def _quantile(values: pl.Series, q: float) -> float | None:
    return values.quantile(q, interpolation="linear")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
