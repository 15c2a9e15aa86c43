"""Implicit rewards as Polars expressions and as a table (lecture sections 5.3 and 6).

A policy's opinion of a reply is its log-ratio against the reference, in nats. Times beta it is the
implicit reward; the difference of the two replies' rewards is the margin, whose sign says whether
the policy agrees with the preference.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import polars as pl

from pipeline.errors import LogratioError, ScoringError
from pipeline.losses import LossSpec, Statistics, Values
from pipeline.losses.table import evaluate
from schemas import AlignedReward, Reward, polars_schema

_SIDES = ("chosen", "rejected")
_SHOWN_IDS = 3


class MixedScorersError(ScoringError):
    """A log-prob frame holds several models or numerics: a subtraction would mix them."""


class DuplicateRowsError(ScoringError):
    """An id that must be unique stands in a frame more than once."""


class MissingLogProbsError(ScoringError):
    """Pairs whose sequences were not scored; names how many and the first ids."""


class NonFiniteLogProbsError(ScoringError):
    """A NaN, an infinity or a null where a number in nats must stand."""


class TokenCountsDifferError(ScoringError):
    """Reference and policy scored different numbers of tokens of one sequence."""


class NoSuchIntervalError(LogratioError):
    """A share or a count no interval can be given for."""


def log_ratio(policy: pl.Expr, reference: pl.Expr) -> pl.Expr:
    """Log pi(y|x) - log pi_ref(y|x) of sequence log-probs, nats (lecture 5.3; DPO paper 4)."""
    return policy - reference


def implicit_reward(log_ratio: pl.Expr, beta: float) -> pl.Expr:
    """Beta x log-ratio, in beta x nats: the reward up to beta log Z(x), which no pair depends on.

    Lecture 3 and 5.3; DPO paper, equation 5.
    """
    return beta * log_ratio


def margin(chosen: pl.Expr, rejected: pl.Expr) -> pl.Expr:
    """reward(chosen) - reward(rejected): the log-odds of the preference (lecture 4)."""
    return chosen - rejected


def margin_noise(noise_floor: float | None, beta: float | None) -> float | None:
    """What a margin may be off by at worst, beta x nats; None if it was not measured.

    A margin is beta x the signed sum of four log-probs (two models, two replies), each off by the
    floor at worst.
    """
    return None if noise_floor is None or beta is None else beta * 4 * noise_floor


def correct(margin: pl.Expr) -> pl.Expr:
    """1.0 for a positive margin, 0.0 for a negative one, 0.5 for a tie; null for NaN or null.

    Polars holds `NaN > 0` to be true, so NaN is asked for first.
    """
    return (
        pl.when(margin.is_nan())
        .then(None)
        .when(margin > 0)
        .then(1.0)
        .when(margin < 0)
        .then(0.0)
        .when(margin == 0)
        .then(0.5)
    )


def dpo_gradient_weight(objective_margin: pl.Expr) -> pl.Expr:
    """sigmoid(-m): |dLoss/dm| of the DPO loss, between 0 and 1 (lecture 6.2; DPO paper 4).

    Only exp(-|m|) is taken, so nothing overflows; far right it keeps its relative precision until
    it underflows to 0.
    """
    small = (-objective_margin.abs()).exp()
    return pl.when(objective_margin >= 0).then(small / (1 + small)).otherwise(1 / (1 + small))


def reward_table(
    pairs: pl.DataFrame,
    pair_sequences: pl.DataFrame,
    reference: pl.DataFrame,
    policy: pl.DataFrame,
    *,
    beta: float,
    spec: LossSpec,
    values: Values,
    statistics: Statistics,
    policy_id: str,
    pairs_digest: str,
    noise_floor: float | None = None,
    extras: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Every tokenised pair under one policy, as `schemas.Reward`, sorted by `pair_id`.

    With `extras` as `schemas.AlignedReward`.

    A pair without a row in `pair_sequences` was quarantined at tokenisation and is left out.

    Args:
        pairs: `schemas.PreferencePair`.
        pair_sequences: `schemas.PairSequence`, of one tokenisation.
        reference: `schemas.LogProb` of one model under one numerics; sums in nats.
        policy: the same for the policy.
        beta: the report's, the same for every policy.
        spec: the objective's loss, whose scores and gradient weights (lecture 6.2) are shown.
        values: its parameters.
        statistics: what it knows beside its pair, for instance KTO's `kl`.
        policy_id: of the trained policy.
        pairs_digest: the snapshot `pairs` was read from.
        noise_floor: what a log-prob of either model may be off by, nats; None if not measured.
        extras: `schemas.SequenceExtra` of the policy, which then must have every sequence's
            `log_sum_squares`.

    Raises:
        ValueError: beta is not a positive finite number.
        MixedScorersError: `reference` or `policy` has several models or numerics, or `extras` are
            another's.
        DuplicateRowsError: a pair or a sequence stands in a frame twice.
        MissingLogProbsError: a tokenised pair's sequence was not scored, or not for its extra.
        NonFiniteLogProbsError: a log-prob, or a number made of them, is not finite.
        TokenCountsDifferError: the two models scored different tokens of a sequence.
        LossInputError: the loss needs a column that `pairs` has not, or its scores overflow.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive number, not {beta}")
    _require_unique(pairs, "pair_id", "pairs")
    _require_unique(pair_sequences, "pair_id", "pair_sequences")
    for name, frame in (("reference", reference), ("policy", policy)):
        _require_unique(frame, "sequence_id", name)
        _require_one_scorer(frame, name)
        _require_finite(frame, ["logprob"], "sequence_id", f"the log-probs of the {name}")

    more = [column for column in spec.columns if column in pairs.columns]
    joined = pairs.select("pair_id", "prompt_id", "split", "sources", *more).join(
        pair_sequences.select("pair_id", "chosen_id", "rejected_id"), on="pair_id"
    )
    for side in _SIDES:
        for prefix, frame in (("ref", reference), ("policy", policy)):
            joined = joined.join(
                frame.select(
                    pl.col("sequence_id").alias(f"{side}_id"),
                    pl.col("logprob").cast(pl.Float64).alias(f"{prefix}_{side}"),
                    pl.col("n_tokens").cast(pl.Int64).alias(f"{prefix}_n_{side}"),
                ),
                on=f"{side}_id",
                how="left",
            )
    _require_scored(joined)
    _require_same_tokens(joined)

    if extras is not None:
        joined = _with_alignment(joined, extras, policy)
    joined = joined.sort("pair_id")  # joins keep no order
    table = _with_rewards(joined, beta, spec, values, statistics).with_columns(
        policy_id=pl.lit(policy_id),
        policy_model_id=pl.lit(_only(policy, "model_id"), pl.String),
        reference_model_id=pl.lit(_only(reference, "model_id"), pl.String),
        numerics_id=pl.lit(_only(reference, "numerics_id"), pl.String),
        pairs_digest=pl.lit(pairs_digest),
        noise_floor=pl.lit(margin_noise(noise_floor, beta), pl.Float64),
    )
    schema = polars_schema(Reward if extras is None else AlignedReward)
    table = table.select(pl.col(name).cast(dtype) for name, dtype in schema.items())
    # Finite log-probs can still overflow in an objective's score.
    floats = [n for n, dtype in schema.items() if dtype == pl.Float64 and n != "noise_floor"]
    _require_finite(table, floats, "pair_id", "the rewards")
    return table


@dataclass(frozen=True)
class Accuracy:
    """How often a policy agrees with the preferences.

    Attributes:
        mean: mean of `correct`, a tie counting half; None without pairs.
        low: lower end of the 95 % Wilson interval; None without pairs.
        high: its upper end.
        n: pairs.
        n_ties: pairs whose margin is exactly 0.
        n_prompts: distinct prompts, the interval's sample size.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    n_ties: int
    n_prompts: int


def accuracy(rewards: pl.DataFrame) -> Accuracy:
    """Mean of `correct` over `schemas.Reward` rows, with a 95 % Wilson interval.

    Pairs of one prompt are not independent, so the interval counts prompts, not pairs: at worst
    too wide, and the plain Wilson interval when no prompt repeats. A tie counts as half a success.

    Raises:
        NonFiniteLogProbsError: a value of `correct` is NaN or null.
    """
    _require_finite(rewards, ["correct"], "pair_id", "`correct`")
    n, n_prompts = rewards.height, rewards["prompt_id"].n_unique()
    n_ties = rewards.filter(pl.col("correct") == 0.5).height
    if n == 0:
        return Accuracy(mean=None, low=None, high=None, n=0, n_ties=0, n_prompts=0)
    mean = math.fsum(rewards["correct"]) / n
    low, high = wilson_interval(mean, n_prompts)
    return Accuracy(mean=mean, low=low, high=high, n=n, n_ties=n_ties, n_prompts=n_prompts)


def wilson_interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share seen in n trials (Wilson 1927, JASA 22:209-212).

    Raises:
        NoSuchIntervalError: n is below 1, or the share or the confidence is outside its range.
    """
    if n < 1 or not 0 <= share <= 1 or not 0 < confidence < 1:
        raise NoSuchIntervalError(f"no {confidence} interval for a share of {share} in {n} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the bound is exact; rounding would put it a hair beside.
    low = 0.0 if share == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if share == 1 else min(1.0, (centre + half) / scale)
    return low, high


def _with_alignment(
    joined: pl.DataFrame, extras: pl.DataFrame, policy: pl.DataFrame
) -> pl.DataFrame:
    """Adds `alignment_chosen` and `alignment_rejected`, nats per token (WPO, equation 2)."""
    squares = extras.filter(pl.col("extra") == "log_sum_squares")
    _require_unique(squares, "sequence_id", "extras")
    if not (policy.is_empty() or squares.is_empty()):
        for column in ("model_id", "numerics_id"):
            both = pl.concat([policy[column], squares[column]]).unique()
            if len(both) > 1:
                raise MixedScorersError(f"the extras are not the policy's: {_listed(both.sort())}")
    for side in _SIDES:
        of_side = squares.select(
            pl.col("sequence_id").alias(f"{side}_id"), total="total", n="n_tokens"
        )
        joined = joined.join(of_side, on=f"{side}_id", how="left")
        missing = joined.filter(pl.col("total").is_null())
        if missing.height:
            raise MissingLogProbsError(
                f"{missing.height} pairs' {side} replies have no log_sum_squares by the policy: "
                f"{_listed(missing['pair_id'].sort())}"
            )
        differ = joined.filter(pl.col("n") != pl.col(f"policy_n_{side}"))["pair_id"].sort()
        if len(differ):
            raise TokenCountsDifferError(
                f"log-probs and extras are of different numbers of tokens in {len(differ)} pairs: "
                f"{_listed(differ)}"
            )
        alignment = (pl.col(f"policy_{side}") - pl.col("total")) / pl.col("n")
        joined = joined.with_columns(alignment.alias(f"alignment_{side}")).drop("total", "n")
    return joined


def _with_rewards(
    joined: pl.DataFrame,
    beta: float,
    spec: LossSpec,
    values: Values,
    statistics: Statistics,
) -> pl.DataFrame:
    """Adds every column that follows from the log-probs, one stage at a time."""
    col = pl.col
    counted = joined.with_columns(col(f"ref_n_{s}").alias(f"n_{s}") for s in _SIDES)
    own = _objective(counted, spec, values, statistics)
    return (
        pl.concat([counted, own], how="horizontal")
        .with_columns(beta=pl.lit(beta, pl.Float64))
        .with_columns(
            log_ratio(col(f"policy_{s}"), col(f"ref_{s}")).alias(f"logratio_{s}") for s in _SIDES
        )
        .with_columns(
            implicit_reward(col(f"logratio_{s}"), beta).alias(f"reward_{s}") for s in _SIDES
        )
        .with_columns(margin=margin(col("reward_chosen"), col("reward_rejected")))
        .with_columns(correct=correct(col("margin")))
    )


def _objective(
    counted: pl.DataFrame, spec: LossSpec, values: Values, statistics: Statistics
) -> pl.DataFrame:
    """Both replies' scores in the objective's own scale, and the pair's gradient weight."""
    return evaluate(counted, spec, values, statistics).select(
        *(pl.col(f"score_{s}").alias(f"objective_score_{s}") for s in _SIDES), "gradient_weight"
    )


def _only(frame: pl.DataFrame, column: str) -> str | None:
    """The one value of a column, or None of an empty frame."""
    return None if frame.is_empty() else frame.item(0, column)


def _require_one_scorer(frame: pl.DataFrame, name: str) -> None:
    for column in ("model_id", "numerics_id"):
        values = frame[column].unique().sort()
        if len(values) > 1:
            raise MixedScorersError(
                f"the log-probs of the {name} have {len(values)} values of {column} "
                f"({_listed(values)}); give one"
            )


def _require_unique(frame: pl.DataFrame, key: str, name: str) -> None:
    repeated = frame.filter(pl.col(key).is_duplicated())[key].unique().sort()
    if len(repeated):
        raise DuplicateRowsError(
            f"{len(repeated)} values of {key} stand in {name} more than once: {_listed(repeated)}"
        )


def _require_finite(frame: pl.DataFrame, columns: list[str], key: str, what: str) -> None:
    finite = pl.all_horizontal(pl.col(c).is_finite().fill_null(value=False) for c in columns)
    bad = frame.filter(~finite)[key].sort()
    if len(bad):
        raise NonFiniteLogProbsError(
            f"{what} hold {len(bad)} rows that are not finite numbers; "
            f"first by {key}: {_listed(bad)}"
        )


def _require_scored(joined: pl.DataFrame) -> None:
    complaints = []
    missing = pl.DataFrame(schema={"pair_id": pl.String})
    for prefix, name in (("ref", "reference"), ("policy", "policy")):
        lacking = [joined.filter(pl.col(f"{prefix}_{side}").is_null()) for side in _SIDES]
        missing = pl.concat([missing, *(frame.select("pair_id") for frame in lacking)])
        ids = pl.concat([frame[f"{side}_id"] for frame, side in zip(lacking, _SIDES, strict=True)])
        if len(ids):
            unique = ids.unique().sort()
            complaints.append(f"{len(unique)} sequences by the {name} ({_listed(unique)})")
    if complaints:
        pairs = missing["pair_id"].unique().sort()
        raise MissingLogProbsError(
            f"{len(pairs)} pairs are not scored ({_listed(pairs)}): "
            f"missing are {' and '.join(complaints)}"
        )


def _require_same_tokens(joined: pl.DataFrame) -> None:
    differ = pl.any_horizontal(pl.col(f"ref_n_{s}") != pl.col(f"policy_n_{s}") for s in _SIDES)
    pairs = joined.filter(differ)["pair_id"].sort()
    if len(pairs):
        raise TokenCountsDifferError(
            f"reference and policy scored different numbers of tokens in {len(pairs)} pairs: "
            f"{_listed(pairs)}"
        )


def _listed(ids: Iterable[str]) -> str:
    """The first few ids, for a message."""
    ids = list(ids)
    return ", ".join(map(str, ids[:_SHOWN_IDS])) + (", …" if len(ids) > _SHOWN_IDS else "")
