"""What a policy has to beat: rules that know nothing of it, on the same pairs.

Length alone, the longer or the shorter reply as the training pairs have it; the words of the
replies, by a TF-IDF + logistic classifier fitted on the pairs the policy was trained on; and the
untrained reference, which prefers what it finds more likely.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.ids import unit_interval
from pipeline.rewards import accuracy, correct

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MOST_FITTED = 20_000
"""Pairs the classifier is fitted on at most, the first by their ids' hash."""
FOLDS = 5
"""Of the cross-validation where nothing was trained on; by prompt."""


def baselines(rewards: pl.DataFrame, pairs: pl.DataFrame, fitted: pl.DataFrame) -> dict[str, Any]:
    """Accuracy of every baseline on the pairs in `rewards`, ties half.

    Args:
        rewards: `schemas.Reward`, finite; the pairs to judge by.
        pairs: `schemas.PreferencePair`, at least those.
        fitted: `schemas.PreferencePair` the classifier is fitted on, and the rule about length
            chosen by; if it is empty, the rule is the longer reply, and the classifier is
            cross-validated on the judged pairs, by prompt.

    Returns:
        `rows`, each with `key`, `accuracy`, `accuracy_low` and `accuracy_high` (95 %, as
        `pipeline.rewards.accuracy`), None where there is nothing to say; `length_rule`, `longer` or
        `shorter`; and `n_fitted`, `cross_validated` of the classifier.
    """
    rewards = rewards.sort("pair_id")
    chosen, rejected = pl.col("ref_chosen"), pl.col("ref_rejected")
    n_chosen, n_rejected = pl.col("n_chosen"), pl.col("n_rejected")
    longer = pl.col("chosen").str.len_chars() > pl.col("rejected").str.len_chars()
    shorter = 2 * fitted.filter(longer).height < fitted.height
    sign = -1.0 if shorter else 1.0
    words, n_fitted, crossed = _words(rewards, pairs, fitted)
    scores = {
        "length": rewards.select(sign * (n_chosen - n_rejected)).to_series(),
        "words": words,
        "reference_sum": rewards.select(chosen - rejected).to_series(),
        "reference_per_token": rewards.select(
            chosen / n_chosen - rejected / n_rejected
        ).to_series(),
    }
    return {
        "rows": [{"key": key, **_accuracy(rewards, score)} for key, score in scores.items()],
        "length_rule": "shorter" if shorter else "longer",
        "n_fitted": n_fitted,
        "cross_validated": crossed,
    }


def classifier_scores(fit: pl.DataFrame, judge: pl.DataFrame) -> NDArray[np.float64]:
    """How much more a classifier of words likes `chosen` than `rejected`, float64 [n], log-odds.

    Logistic regression without intercept on the difference of the two replies' TF-IDF vectors
    (one and two words, as scikit-learn has them by default), which is Bradley-Terry with a linear
    reward. Each pair counts both ways round.

    Args:
        fit: columns `chosen` and `rejected`, at least one pair with a word.
        judge: the same columns.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    vectors.fit([*fit["chosen"], *fit["rejected"]])

    def difference(frame: pl.DataFrame) -> "csr_matrix":
        return vectors.transform(frame["chosen"]) - vectors.transform(frame["rejected"])

    seen = difference(fit)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(vstack([seen, -seen]), np.repeat([1, 0], fit.height))
    scores: NDArray[np.float64] = model.decision_function(difference(judge))
    return scores


def _words(
    rewards: pl.DataFrame, pairs: pl.DataFrame, fitted: pl.DataFrame
) -> tuple[pl.Series | None, int, bool]:
    """The classifier's scores in the order of `rewards`, pairs fitted on, and whether crossed."""
    texts = ["pair_id", "chosen", "rejected"]
    judged = rewards.select("pair_id", "prompt_id").join(
        pairs.select(texts), on="pair_id", how="left", maintain_order="left"
    )
    crossed = fitted.is_empty()
    if crossed:
        scores, n = _crossed(judged)
    else:
        kept = sorted(fitted["pair_id"], key=partial(unit_interval, salt="baseline"))[:MOST_FITTED]
        fit = fitted.filter(pl.col("pair_id").is_in(kept)).sort("pair_id")
        scores, n = _fitted(fit, judged), fit.height
    return scores, n, crossed


def _fitted(fit: pl.DataFrame, judge: pl.DataFrame) -> pl.Series | None:
    try:
        return pl.Series(classifier_scores(fit, judge), dtype=pl.Float64)
    except ValueError:  # no reply holds a word
        return None


def _crossed(judged: pl.DataFrame) -> tuple[pl.Series | None, int]:
    """Scores of each fold by a classifier of the others; folds hold whole prompts."""
    if judged["prompt_id"].n_unique() < 2 * FOLDS:
        return None, 0
    folds = pl.Series([int(unit_interval(i, "fold") * FOLDS) for i in judged["prompt_id"]])
    scores = np.zeros(judged.height)
    for fold in range(FOLDS):
        held = folds == fold
        if not held.any():
            continue
        part = _fitted(judged.filter(~held), judged.filter(held))
        if part is None:
            return None, 0
        scores[held.to_numpy()] = part.to_numpy()
    return pl.Series(scores), judged.height


def _accuracy(rewards: pl.DataFrame, score: pl.Series | None) -> dict[str, float | None]:
    if score is None or not all(map(math.isfinite, score)):
        return dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"))
    judged = rewards.select("pair_id", "prompt_id").with_columns(score=score)
    agreed = accuracy(judged.with_columns(correct=correct(pl.col("score"))))
    return {
        "accuracy": agreed.mean,
        "accuracy_low": agreed.low,
        "accuracy_high": agreed.high,
    }
