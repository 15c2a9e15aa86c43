"""WPO from the engine's extras to `rewards` and the landscape, beside float64 by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from reward_inputs import ident, tables
from scoring.oracle import Oracle
from support import build_tiny_model, measured, prepared

from assets.report import implicit_rewards
from pipeline.errors import PlanError, ScoringError
from pipeline.ids import content_id
from pipeline.landscape import answerable
from pipeline.losses import LossInputError
from pipeline.models import Checkpoint
from pipeline.names import key_of
from pipeline.plan import Plan, load_plan, write_audit_plan
from pipeline.rewards import MissingLogProbsError, MixedScorersError, TokenCountsDifferError
from pipeline.scoring import run as scoring_run
from pipeline.scoring.engines import numerics_of
from pipeline.scoring.ledger import read_extras, read_logprobs, scorer_directories
from pipeline.stages import compute_landscape, compute_rewards, score, scored_rows
from pipeline.store import Store, read
from schemas import AlignedReward, Reward, SequenceExtra, polars_schema

BETA = 0.1
EXTRAS = "scoring.token_extras=[log_sum_squares]"
ASKED = ("report.landscape.losses=[wpo, dpo]", f"report.landscape.beta=[{BETA}]")
SIDES = ("chosen", "rejected")


@pytest.fixture
def audit(tmp_path: Path, tiny_model: Path, write_pairs: Any) -> Path:
    policy = build_tiny_model(tmp_path / "theirs", seed=4)
    return write_audit_plan(write_pairs(16), str(tiny_model), str(policy), store=tmp_path / "store")


def rewarded(plan: Plan, store: Store) -> pl.DataFrame:
    score(plan, store, "theirs")
    compute_rewards(plan, store, "theirs")
    return read(store, "rewards/theirs").sort("pair_id")


def of_tokens(oracle: Oracle, sequence: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """log p(token) and log sum p(v)^2 of every token of a completion, float64, nats."""
    prompt, reply = (np.array(sequence[f"{part}_ids"]) for part in ("prompt", "completion"))
    row = torch.tensor([[*prompt.tolist(), *reply.tolist()]])
    with torch.inference_mode():
        p = torch.softmax(oracle.model(input_ids=row).logits[0, len(prompt) - 1 : -1], -1)
    assert p.dtype == torch.float64
    chosen = p[torch.arange(len(reply)), torch.tensor(reply, dtype=torch.long)]
    return chosen.log().numpy(), p.square().sum(-1).log().numpy()


def test_the_landscape_answers_wpo_as_the_paper_has_it(audit: Path, tiny_model: Path) -> None:
    plan, store = prepared(audit, EXTRAS, *ASKED)
    rewards = rewarded(plan, store)
    assert rewards.schema == polars_schema(AlignedReward)
    policy, reference = (
        Oracle(Checkpoint(path)) for path in (audit.parents[2] / "theirs", tiny_model)
    )
    sequences = {row["sequence_id"]: row for row in read(store, "sequences").to_dicts()}
    losses: dict[str, list[float]] = {"wpo": [], "no squares": [], "the reference's": []}
    weights, worst = [], 0.0
    for row, way in zip(
        rewards.to_dicts(),
        read(store, "pair_sequences").sort("pair_id").to_dicts(),
        strict=True,
    ):
        ratios, aligned, bare, others = {}, {}, 0.0, 0.0
        for side in SIDES:
            mine, squares = of_tokens(policy, sequences[way[f"{side}_id"]])
            theirs, their_squares = of_tokens(reference, sequences[way[f"{side}_id"]])
            ratios[side] = mine.sum() - theirs.sum()
            aligned[side] = (mine - squares).mean()
            bare += mine.mean()
            others += (mine - their_squares).mean()
            worst = max(worst, abs(row[f"alignment_{side}"] - aligned[side]))
        margin = BETA * (ratios["chosen"] - ratios["rejected"])
        dpo, slope = np.log1p(np.exp(-margin)), 1 / (1 + np.exp(margin))
        losses["wpo"].append(np.exp(sum(aligned.values())) * dpo)
        losses["no squares"].append(np.exp(bare) * dpo)
        losses["the reference's"].append(np.exp(others) * dpo)
        weights.append(np.exp(sum(aligned.values())) * slope)
    compute_landscape(plan, store)
    (found,) = read(store, "loss_landscape").filter(pl.col("loss") == "wpo").to_dicts()
    expected, *controls = (float(np.mean(values)) for values in losses.values())
    measured(
        f"alignments at most {worst:.1e} nats per token off; WPO {found['mean_loss']:.6g}, by hand "
        f"{expected:.6g}, controls {controls[0]:.6g}, {controls[1]:.6g}"
    )
    assert worst < 1e-4
    assert found["mean_loss"] == pytest.approx(expected, rel=1e-3)
    assert found["weight_mean"] == pytest.approx(float(np.mean(weights)), rel=1e-3)
    for control in controls:
        assert found["mean_loss"] != pytest.approx(control, rel=0.05), "the control must fail"


def test_turned_on_later_only_the_policy_is_scored_again_and_no_number_changes(
    audit: Path,
) -> None:
    plan, store = prepared(audit)
    before = rewarded(plan, store)
    assert before.schema == polars_schema(Reward)
    key, _ = key_of(plan, store, "theirs")
    logprobs, scorers = read_logprobs(key), scorer_directories(store.ledger)
    table = scored_rows(plan, store, "theirs", key)
    held = logprobs.sort("sequence_id")
    assert table.digest == content_id(
        "scored", held["sequence_id"].to_list(), held["logprob"].to_list()
    )
    assert "wpo" not in answerable(before.columns)
    wanting = load_plan(audit, [*ASKED])
    with pytest.raises(LossInputError, match="wpo needs the columns alignment_chosen"):
        compute_landscape(wanting, store)

    plan = load_plan(audit, [EXTRAS])
    assert scored_rows(plan, store, "theirs", key).n_rows == 0, "the check would fail"
    for name in plan.scored_models:
        assert score(plan, store, name).n_scored == 0
    result = score(plan, store, "theirs")
    assert (result.n_scored, result.n_reused) == (table.n_rows, 0)
    assert read_extras(key).height == table.n_rows
    assert scorer_directories(store.ledger) == scorers
    assert read_logprobs(key).equals(logprobs)
    after = rewarded(plan, store)
    assert after.select(before.columns).equals(before)
    assert "wpo" in answerable(after.columns)
    now = scored_rows(plan, store, "theirs", key)
    assert (now.n_rows, now.mean) == (table.n_rows, table.mean)
    assert now.digest != table.digest
    # And off again: as it was, though the ledger has them.
    assert rewarded(load_plan(audit), store).equals(before)


def test_the_asset_says_which_columns_it_has(audit: Path) -> None:
    for overrides in ([], [EXTRAS]):
        plan = load_plan(audit, overrides)
        asset = implicit_rewards(plan, "theirs")
        schema = asset.metadata_by_key[asset.key]["dagster/column_schema"]
        names = [column.name for column in schema.columns]
        assert ("alignment_chosen" in names) == bool(overrides)


def test_a_plan_that_would_need_them_of_vllm_is_refused(
    audit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(audit)
    reference = plan.reference_of("theirs")
    with pytest.raises(PlanError) as caught:
        load_plan(audit, [EXTRAS, f"models.{reference}.engine=vllm"])
    assert "scoring.token_extras" in str(caught.value)
    assert f"'theirs' is scored as its reference '{reference}' is, by vLLM" in str(caught.value)
    with pytest.raises(PlanError, match="token_extras"):
        load_plan(audit, ["scoring.token_extras=[is_top1]"])
    # `auto` may be vLLM on the machine that scores.
    plan, store = prepared(audit, EXTRAS)
    monkeypatch.setattr(
        scoring_run, "numerics_of", lambda *of: replace(numerics_of(*of), engine="vllm")
    )
    with pytest.raises(ScoringError, match="'theirs' is scored by vLLM"):
        score(plan, store, "theirs")


def squares(policy: pl.DataFrame) -> pl.DataFrame:
    """An extra for every log-prob of a table."""
    return policy.select(
        "model_id",
        "numerics_id",
        "sequence_id",
        extra=pl.lit("log_sum_squares"),
        total=pl.col("logprob") / 3,
        n_tokens="n_tokens",
    ).cast(dict(polars_schema(SequenceExtra)))  # type: ignore[arg-type]


def test_alignment_is_a_mean_per_token() -> None:
    made = tables(20)
    found = made.rewards(extras=squares(made.policy))
    AlignedReward.validate(found)
    assert found.select(polars_schema(Reward).names()).equals(made.rewards())
    for row in found.to_dicts():
        for side in SIDES:
            expected = row[f"policy_{side}"] * (2 / 3) / row[f"n_{side}"]
            assert row[f"alignment_{side}"] == pytest.approx(expected, rel=1e-12)


def test_extras_that_do_not_fit_the_policy_are_refused() -> None:
    made = tables(20)
    extras = squares(made.policy)
    with pytest.raises(MissingLogProbsError, match="have no log_sum_squares by the policy"):
        made.rewards(extras=extras.head(7))
    with pytest.raises(MissingLogProbsError):
        made.rewards(extras=extras.with_columns(extra=pl.lit("entropy")))
    with pytest.raises(MixedScorersError, match="the extras are not the policy's"):
        made.rewards(extras=extras.with_columns(model_id=pl.lit(ident("other"))))
    with pytest.raises(TokenCountsDifferError, match="extras are of different numbers of tokens"):
        made.rewards(extras=extras.with_columns(pl.col("n_tokens") + 1))
