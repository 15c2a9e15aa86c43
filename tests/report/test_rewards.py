"""Implicit rewards against DuckDB, SciPy and closed forms."""

import math
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_inputs import BETA, OBJECTIVE_BETA, Tables, ident, tables
from scipy.special import expit
from scipy.stats import binomtest

from pipeline import rewards
from pipeline.losses import REGISTRY, LossInputError
from schemas import Reward, polars_schema


def query(sql: str) -> pl.DataFrame:
    relation = duckdb.sql(sql)
    assert relation is not None
    found: pl.DataFrame = relation.pl()
    return found


def oracle(made: Tables, folder: Path, beta: float = BETA) -> pl.DataFrame:
    """The same numbers from DuckDB over Parquet files."""
    for name, table in vars(made).items():
        table.write_parquet(folder / f"{name}.parquet")
    at = str(folder)
    return query(
        f"""
        SELECT p.pair_id, p.split, rw.n_tokens AS n_chosen, rl.n_tokens AS n_rejected,
            pw.logprob - rw.logprob AS hw, pl.logprob - rl.logprob AS hl,
            {beta} * (pw.logprob - rw.logprob) - {beta} * (pl.logprob - rl.logprob) AS margin,
            CASE WHEN margin > 0 THEN 1.0 WHEN margin < 0 THEN 0.0 ELSE 0.5 END AS correct,
            1 / (1 + exp({OBJECTIVE_BETA} * (hw - hl))) AS weight
        FROM '{at}/pairs.parquet' p JOIN '{at}/pair_sequences.parquet' s USING (pair_id)
        JOIN '{at}/reference.parquet' rw ON rw.sequence_id = s.chosen_id
        JOIN '{at}/reference.parquet' rl ON rl.sequence_id = s.rejected_id
        JOIN '{at}/policy.parquet' pw ON pw.sequence_id = s.chosen_id
        JOIN '{at}/policy.parquet' pl ON pl.sequence_id = s.rejected_id
        ORDER BY p.pair_id
        """
    )


def agree(ours: pl.Series, theirs: pl.Series, tolerance: float = 1e-12) -> bool:
    return len(ours) == len(theirs) and bool(
        ((ours - theirs.cast(pl.Float64)).abs() <= tolerance).all()
    )


def test_table_is_the_schema_and_sorted() -> None:
    table = tables().rewards()
    Reward.validate(table)
    assert table.schema == polars_schema(Reward)
    assert table["pair_id"].to_list() == sorted(table["pair_id"])
    assert table["numerics_id"].unique().to_list() == [ident("numerics", "ref")]
    assert table["policy_model_id"].unique().to_list() == [ident("pol")]
    assert table["reference_model_id"].unique().to_list() == [ident("ref")]


def test_numbers_match_duckdb(tmp_path: Path) -> None:
    made = tables(200)
    table, theirs = made.rewards(), oracle(made, tmp_path)
    assert table["pair_id"].to_list() == theirs["pair_id"].to_list()
    renamed = {"hw": "logratio_chosen", "hl": "logratio_rejected", "weight": "gradient_weight"}
    for name in ("hw", "hl", "margin", "correct", "weight", "n_chosen", "n_rejected"):
        assert agree(table[renamed.get(name, name)], theirs[name]), name
    # -0.0 and rounding left no tie out: one pair in seven.
    assert table.filter(correct=0.5).height == theirs.filter(pl.col("correct") == 0.5).height == 29
    assert agree(table["reward_chosen"], BETA * theirs["hw"])
    assert agree(table["objective_score_rejected"], OBJECTIVE_BETA * theirs["hl"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made.rewards(beta=2 * BETA),
        lambda made: made.rewards(reference=made.policy, policy=made.reference),
        lambda made: made.rewards(
            pair_sequences=made.pair_sequences.rename(
                {"chosen_id": "rejected_id", "rejected_id": "chosen_id"}
            )
        ),
    ],
    ids=["wrong beta", "reference and policy swapped", "sides swapped"],
)
def test_control_a_wrong_table_does_not_match(
    spoil: Callable[[Tables], pl.DataFrame], tmp_path: Path
) -> None:
    made = tables()
    assert not agree(spoil(made)["margin"], oracle(made, tmp_path)["margin"], tolerance=1e-3)


def test_policy_that_is_the_reference_has_no_opinion() -> None:
    made = tables()
    table = made.rewards(policy=made.reference)
    for column in ("logratio_chosen", "logratio_rejected", "reward_chosen", "margin"):
        assert table[column].to_list() == [0.0] * table.height
    assert table["gradient_weight"].to_list() == [0.5] * table.height
    summary = rewards.accuracy(table)
    assert (summary.mean, summary.n_ties) == (0.5, table.height)


def test_swapping_the_sides_negates_margins() -> None:
    made = tables()
    swapped = made.pair_sequences.rename({"chosen_id": "rejected_id", "rejected_id": "chosen_id"})
    table, other = made.rewards(), made.rewards(pair_sequences=swapped)
    assert other["margin"].to_list() == (-table["margin"]).to_list()
    forward, backward = rewards.accuracy(table).mean, rewards.accuracy(other).mean
    assert forward is not None
    assert forward != 0.5
    assert backward == pytest.approx(1 - forward, abs=1e-15)


def test_doubling_beta_doubles_margins_and_keeps_accuracy() -> None:
    made = tables()
    table, other = made.rewards(), made.rewards(beta=2 * BETA)
    assert other["margin"].to_list() == (2 * table["margin"]).to_list()
    assert rewards.accuracy(other) == rewards.accuracy(table)
    # The objective's own scale does not follow the report's beta.
    assert other["objective_score_chosen"].equals(table["objective_score_chosen"])
    assert other["gradient_weight"].equals(table["gradient_weight"])


def test_lecture_example() -> None:
    """Lecture section 9: the three pairs of its code sample, beta 0.1."""
    policy = {"pw": [-2.5, -3.0, -2.8], "pl": [-3.5, -4.0, -3.8]}
    reference = {"rw": [-2.8, -3.2, -3.0], "rl": [-3.2, -3.8, -3.5]}
    col = pl.col
    margins = pl.DataFrame(policy | reference).select(
        rewards.margin(
            rewards.implicit_reward(rewards.log_ratio(col("pw"), col("rw")), 0.1),
            rewards.implicit_reward(rewards.log_ratio(col("pl"), col("rl")), 0.1),
        )
    )
    assert margins.to_series().to_list() == pytest.approx([0.06, 0.04, 0.05], abs=1e-15)


def test_score_sees_log_ratio_log_prob_and_tokens() -> None:
    """SimPO's score is of the policy's mean log-prob alone."""
    table = tables().rewards(spec=REGISTRY["simpo"], values={"beta": 2.0, "gamma": 0.5})
    expected = 2.0 * table["policy_rejected"] / table["n_rejected"]
    assert agree(table["objective_score_rejected"], expected)


def test_row_order_does_not_matter() -> None:
    made = tables()
    backwards = Tables(*(table.reverse() for table in vars(made).values()))
    assert backwards.rewards().equals(made.rewards())


def test_a_margin_is_off_by_its_noise_floor_at_worst() -> None:
    made, floor = tables(), 3e-3
    table = made.rewards(noise_floor=floor)
    assert made.rewards()["noise_floor"].null_count() == table.height, "not measured"
    generator = np.random.default_rng(0)

    def noisy(frame: pl.DataFrame, signs: np.ndarray) -> pl.DataFrame:
        return frame.with_columns(pl.col("logprob") + floor * signs)

    worst = pl.zeros(table.height, eager=True)
    for _ in range(40):
        signs = (generator.choice([-1.0, 1.0], made.policy.height) for _ in range(2))
        off = made.rewards(
            reference=noisy(made.reference, next(signs)), policy=noisy(made.policy, next(signs))
        )
        moved = (off["margin"] - table["margin"]).abs()
        assert (moved <= table["noise_floor"] * (1 + 1e-9)).all()
        worst = pl.select(pl.max_horizontal(worst, moved)).to_series()
    assert (worst >= table["noise_floor"] * (1 - 1e-9)).any(), "and no more than that is claimed"


def test_pairs_that_were_not_tokenised_are_left_out() -> None:
    made = tables()
    kept = made.pair_sequences.sort("pair_id").head(41)
    assert made.rewards(pair_sequences=kept)["pair_id"].to_list() == kept["pair_id"].to_list()
    none = made.rewards(pair_sequences=kept.clear())
    assert none.schema == polars_schema(Reward)
    assert none.is_empty()


@pytest.mark.parametrize("which", ["reference", "policy"])
def test_missing_log_probs_are_named(which: str) -> None:
    made = tables()
    lost = made.pair_sequences.sort("pair_id")[:5]
    table = getattr(made, which).filter(~pl.col("sequence_id").is_in(lost["chosen_id"].to_list()))
    with pytest.raises(rewards.MissingLogProbsError) as caught:
        made.rewards(**{which: table})
    message = str(caught.value)
    assert "5 pairs" in message
    assert f"5 sequences by the {which}" in message
    assert lost["pair_id"][0] in message
    assert min(lost["chosen_id"]) in message
    with pytest.raises(rewards.MissingLogProbsError, match="60 pairs"):
        made.rewards(**{which: table.clear()})


@pytest.mark.parametrize("which", ["reference", "policy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_non_finite_log_probs_are_refused(which: str, value: float | None) -> None:
    made = tables()
    table = getattr(made, which).sort("sequence_id")
    bad = table["sequence_id"][3]
    spoilt = table.with_columns(
        logprob=pl.when(sequence_id=bad).then(pl.lit(value, pl.Float64)).otherwise("logprob")
    )
    with pytest.raises(rewards.NonFiniteLogProbsError, match=bad):
        made.rewards(**{which: spoilt})


def test_overflow_in_a_score_is_refused() -> None:
    with pytest.raises(LossInputError, match="dpo: loss is not finite"):
        tables().rewards(values={"beta": 1e308})


def test_a_loss_of_strengths_reads_them_from_the_pairs() -> None:
    made = tables()
    with pytest.raises(LossInputError, match="strength: not every row"):
        made.rewards(spec=REGISTRY["rpo_sq"], values={"beta": 0.1, "eta": 1.0})
    known = made.pairs.with_columns(strength=pl.int_range(1, pl.len() + 1).cast(pl.Float64))
    table = Tables(known, made.pair_sequences, made.reference, made.policy).rewards(
        spec=REGISTRY["rpo_sq"], values={"beta": 0.1, "eta": 0.5}
    )
    strength = table.select("pair_id").join(known, on="pair_id", how="left")["strength"]
    assert agree(table["gradient_weight"], (2 * (table["margin"] - 0.5 * strength)).abs())


@pytest.mark.parametrize("column", ["model_id", "numerics_id"])
@pytest.mark.parametrize("which", ["reference", "policy"])
def test_mixed_scorers_are_refused(which: str, column: str) -> None:
    made = tables()
    table = getattr(made, which)
    other = pl.when(pl.int_range(pl.len()) == 7).then(pl.lit(ident("other"))).otherwise(column)
    with pytest.raises(rewards.MixedScorersError, match=column):
        made.rewards(**{which: table.with_columns(other.alias(column))})


@pytest.mark.parametrize("which", ["pairs", "pair_sequences", "reference", "policy"])
def test_repeated_rows_are_refused(which: str) -> None:
    made = tables()
    table = getattr(made, which)
    with pytest.raises(rewards.DuplicateRowsError, match=which):
        made.rewards(**{which: pl.concat([table, table.head(1)])})


def test_different_token_counts_are_refused() -> None:
    made = tables()
    with pytest.raises(rewards.TokenCountsDifferError, match="60 pairs"):
        made.rewards(policy=made.policy.with_columns(pl.col("n_tokens") + 1))


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        tables(1).rewards(beta=beta)


def test_correct_is_never_nan() -> None:
    margins = pl.DataFrame({"m": [1e-300, -1e-300, 0.0, -0.0, math.nan, None, math.inf, -math.inf]})
    found = margins.select(rewards.correct(pl.col("m"))).to_series().to_list()
    assert found == [1.0, 0.0, 0.5, 0.5, None, None, 1.0, 0.0]


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30))
def test_gradient_weight_is_the_sigmoid(margins: list[float]) -> None:
    frame = pl.DataFrame({"m": [*margins, 1e4, -1e4, 710.0, -710.0, 0.0]}, schema={"m": pl.Float64})
    weights = frame.select(rewards.dpo_gradient_weight(pl.col("m"))).to_series().to_list()
    expected = expit(-frame["m"].to_numpy())
    assert all(0 <= w <= 1 for w in weights)
    assert weights == pytest.approx(expected.tolist(), rel=1e-14, abs=1e-300)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(k_of_n: tuple[int, int]) -> None:
    k, n = k_of_n
    theirs = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = rewards.wilson_interval(k / n, n)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize(("share", "n"), [(0.5, 0), (1.1, 10), (-0.1, 10), (math.nan, 10)])
def test_no_interval_of_nonsense(share: float, n: int) -> None:
    with pytest.raises(rewards.NoSuchIntervalError):
        rewards.wilson_interval(share, n)


def accuracy_frame(correct: list[float], prompts: list[str]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "pair_id": [ident(i) for i in range(len(correct))],
            "prompt_id": prompts,
            "correct": correct,
        }
    )


def test_accuracy_is_scipys_when_no_prompt_repeats() -> None:
    correct = [1.0] * 31 + [0.0] * 9
    summary = rewards.accuracy(accuracy_frame(correct, [f"p{i}" for i in range(40)]))
    theirs = binomtest(31, 40).proportion_ci(method="wilson")
    assert (summary.mean, summary.n, summary.n_ties, summary.n_prompts) == (31 / 40, 40, 0, 40)
    assert (summary.low, summary.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_accuracy_counts_prompts_for_its_interval() -> None:
    correct = [1.0, 1.0, 0.5, 0.0] * 10
    summary = rewards.accuracy(accuracy_frame(correct, [f"p{i // 4}" for i in range(40)]))
    theirs = binomtest(5, 8).proportion_ci(method="wilson")  # the same share in fewer trials
    assert (summary.mean, summary.n_ties, summary.n_prompts) == (0.625, 10, 10)
    assert summary.low is not None
    assert summary.low > theirs.low
    assert summary.low == pytest.approx(rewards.wilson_interval(0.625, 10)[0], abs=0)
    assert summary.low < rewards.wilson_interval(0.625, 40)[0]


def test_accuracy_of_nothing_is_none() -> None:
    summary = rewards.accuracy(tables().rewards().clear())
    assert summary == rewards.Accuracy(None, None, None, n=0, n_ties=0, n_prompts=0)


@pytest.mark.parametrize("value", [math.nan, None])
def test_accuracy_refuses_what_is_not_a_number(value: float | None) -> None:
    frame = accuracy_frame([1.0, 0.0], ["a", "b"]).with_columns(
        correct=pl.Series([1.0, value], dtype=pl.Float64)
    )
    with pytest.raises(rewards.NonFiniteLogProbsError):
        rewards.accuracy(frame)
