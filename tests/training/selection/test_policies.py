"""Selections of a plan and the policies trained on them: refusals, identity, gradients."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from support import build_tiny_model, prepared, stepped

from pipeline.errors import PlanError, StoreError, TrainingError
from pipeline.models import Checkpoint
from pipeline.names import key_of
from pipeline.plan import Plan, load_plan, policies_named
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import compute_rewards, score, train
from pipeline.store import Store, read
from pipeline.training.data.examples import Example, training_pairs
from pipeline.training.data.selection import selected_pairs
from pipeline.training.policy import trained_examples
from pipeline.training.run.model import trainable_model

WritePlan = Any


AUDITED: dict[str, Any] = {
    "audits": {"theirs": {"reference": "base", "policy": "other"}},
    "objectives": {
        "dpo": {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "base"},
        "ipo": {"loss": "ipo", "beta": 0.1, "reference": "base", "start": "base"},
    },
}


@pytest.fixture
def write_audited(
    write_plan: WritePlan, tiny_model: Path, tmp_path: Path
) -> Callable[..., tuple[Path, list[str]]]:
    """A plan with an audit and two objectives, and overrides as they are given."""
    other = build_tiny_model(tmp_path / "other", seed=5)
    models = {"base": {"checkpoint": str(tiny_model)}, "other": {"checkpoint": str(other)}}

    def write(*overrides: str, **sections: Any) -> tuple[Path, list[str]]:
        return write_plan(**{**AUDITED, "models": models, **sections}), list(overrides)

    return write


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.where='strenght > 1'", r"training\.where: .*strenght.*may name pair_id, "),
        ("training.where='strength >'", r"training\.where: .*may name .*n_rejected"),
        ("training.where=''", r"training\.where: "),
        ("training.where='strength'", r"training\.where: is a condition \(Boolean\), not Float64"),
        ("training.where='NULL'", r"training\.where: is a condition \(Boolean\), not Null"),
        ("training.where='theirs.margins > 0'", r"training\.where: .*as in dpo\.margin, "),
        ("training.where='base.margin > 0'", r"training\.where: .*of dpo, ipo, theirs, as in"),
        (
            "training.where='theirs > 0'",
            r"training\.where: names theirs without a column; it may name",
        ),
        ("training.where='flags = 1'", r"training\.where: .*List\(String\).*may name"),
        ("training.where='theirs.margin LIKE 1'", r"training\.where: .*may name"),
        ("training.where='AVG(strength) > 1'", r"training\.where: "),
        ("training.where='TRUE; DROP TABLE pairs'", r"training\.where: "),
        ("training.where='TRUE), (TRUE'", r"training\.where: "),
        ("training.where=[1]", r"training\.where: .*valid string"),
        ("training.weight='votes > 1'", r"training\.weight: is a number, not Boolean"),
        ("training.weight='chosen'", r"training\.weight: is a number, not String"),
        ("objectives.ipo.where='a > 1'", r"objectives\.ipo\.where: .*'?a'?"),
        ("objectives.ipo.weight=2", r"objectives\.ipo\.weight: .*valid string"),
        (
            "objectives.dpo.where='dpo.margin > 0'",
            r"objectives\.dpo\.where: 'dpo' would wait for its own rewards: dpo <- dpo",
        ),
        ("training.where='ipo.margin > 0'", r"training\.where: 'ipo' would wait for its own"),
        ("training.retrain=sometimes", r"training\.retrain: 'sometimes' is not one of always"),
        ("training.retrain={min_new_pairs: 0}", r"training\.retrain: .*N at least 1"),
        ("training.retrain={min_new_pairs: true}", r"training\.retrain: .*N at least 1"),
        ("training.retrain={min_pairs: 3}", r"training\.retrain: .*N at least 1"),
    ],
)
def test_a_wrong_expression_is_a_wrong_plan(write_audited: Any, override: str, said: str) -> None:
    path, overrides = write_audited(override)
    with pytest.raises(PlanError, match=said):
        load_plan(path, overrides)


def test_objectives_that_wait_for_each_other_are_refused(write_audited: Any) -> None:
    path, overrides = write_audited(
        "objectives.dpo.where='ipo.margin > 0'", "objectives.ipo.weight='EXP(dpo.margin)'"
    )
    with pytest.raises(PlanError, match=r"rewards: (dpo <- ipo <- dpo|ipo <- dpo <- ipo)"):
        load_plan(path, overrides)
    plan = load_plan(path, overrides[:1])
    assert policies_named(plan, "dpo") == ["ipo"]
    assert policies_named(plan, "ipo") == []


def test_an_objectives_own_words_stand_before_the_trainings(write_audited: Any) -> None:
    path, overrides = write_audited(
        "training.where='theirs.margin > 0 AND votes > 0'",
        "training.weight='EXP(theirs.margin)'",
        "objectives.ipo={loss: ipo, start: base, reference: base, where: 'TRUE', "
        "weight: 'EXP(dpo.margin)'}",
    )
    plan = load_plan(path, overrides)
    assert policies_named(plan, "dpo") == ["theirs"]
    assert policies_named(plan, "ipo") == ["dpo"]


def test_names_that_would_be_taken_for_columns_are_refused(write_audited: Any) -> None:
    audits = {"votes": {"reference": "base", "policy": "other"}}
    path, _ = write_audited(audits=audits)
    load_plan(path)
    with pytest.raises(PlanError, match=r"audits\.votes: is called like what training\.where"):
        load_plan(path, ["training.where='row > 1'"])


def test_rotation_deals_out_partners_before_anything_is_selected(write_plan: WritePlan) -> None:
    kto = {"loss": "kto", "reference": "base", "start": "base", "kl_partner": "batch_rotation"}
    path = write_plan(objectives={"kto": kto})
    load_plan(path, ["training.weight='votes'"])
    with pytest.raises(PlanError, match=r"kto\.kl_partner: .* with training\.where use ring"):
        load_plan(path, ["training.where='votes > 1'"])


def test_a_policy_is_trained_on_what_was_selected(write_plan: WritePlan) -> None:
    """KTO, whose mismatched replies come from pairs that are not selected too."""
    kto = {"loss": "kto", "beta": 0.1, "reference": "base", "start": "base"}
    where = "meta LIKE '%\"even\"%'"
    path = write_plan(objectives={"kto": kto})
    plan, store = prepared(path, f"training.where={json.dumps(where)}")
    result = train(plan, store, "kto")
    pairs = read(store, "pairs").filter(split="train")
    even = pairs.filter(pl.col("meta").str.contains('"even"'))["pair_id"]
    assert 0 < len(even) < pairs.height
    trained = trained_examples(store, result.policy_id)
    assert trained["example_id"].to_list() == sorted(even)
    assert trained["weight"].to_list() == [1.0] * len(even)
    record = json.loads((result.directory / "policy.json").read_text())["selection"]
    assert (record["n"], record["n_selected"]) == (pairs.height, len(even))
    assert (record["where"], record["weight"]) == (where, None)
    assert result.selection is not None
    assert result.selection.to_dict() == record
    # The selection is part of what a policy is, its words are not.
    other = load_plan(path, [f"training.where={json.dumps(f'NOT ({where}) IS FALSE')}"])
    assert selected_pairs(other, store, "kto").pair_ids == sorted(even)
    again = train(other, store, "kto")
    assert (again.policy_id, again.trained) == (result.policy_id, False)
    every = train(load_plan(path), store, "kto")
    assert every.policy_id != result.policy_id
    (store.policies / result.policy_id / "trained_examples.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="damaged"):
        trained_examples(store, result.policy_id)


def test_weights_decide_the_weights(write_plan: WritePlan) -> None:
    path = write_plan()
    plan, store = prepared(path, "training.weight='n_chosen'")
    result = train(plan, store, "dpo")
    weights = trained_examples(store, result.policy_id)["weight"]
    assert weights.n_unique() > 1
    assert result.selection is not None
    assert result.selection.heaviest == weights.max()
    assert train(load_plan(path), store, "dpo").policy_id != result.policy_id
    ones = train(load_plan(path, ["training.weight='1'"]), store, "dpo")
    assert not ones.trained, "all count the same: the policy without weights"


def test_the_gradient_is_the_weighted_means(write_plan: WritePlan) -> None:
    """Per adapter tensor, against a weighted mean written out over a plain float64 model."""
    weight = "1.0 + n_rejected * n_chosen / 10.0 + row"
    plan, store = prepared(write_plan(), f"training.weight={weight!r}")
    weights = selected_pairs(plan, store, "dpo").weights
    examples = [
        replace(p, references=(p.references[0] - 3.0 * i, p.references[1]), weight=weights[
            p.example_id
        ])
        for i, p in enumerate(pairs_of(plan, store)[:4])
    ]  # fmt: skip
    mine = gradients(plan, examples, [example.weight for example in examples])
    assert len({example.weight for example in examples}) == 4
    assert mine < 1e-4
    turned = [example.weight for example in (*examples[1:], examples[0])]
    assert gradients(plan, examples, turned) > 1e-2, "control: the weights of other pairs"
    assert gradients(plan, examples, [1.0] * 4) > 1e-2, "control: no weights"


def gradients(plan: Plan, examples: list[Any], weights: list[float]) -> float:
    """The largest relative error, over tensors, of a step's gradient against autograd's."""
    objective, config = plan.objectives["dpo"], plan.models["base"]
    start = Checkpoint(Path(config.checkpoint))
    single, double = (
        trainable_model(
            start, config.model_copy(update={"dtype": dtype}), plan.training, torch.device("cpu")
        )
        for dtype in ("float32", "float64")
    )
    twins = dict(double.named_parameters())
    torch.manual_seed(0)
    for name, parameter in single.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
        twins[name].data = parameter.data.double()
    stepped(single, examples, objective)
    losses = torch.stack([written_out(double, e, objective.values["beta"]) for e in examples])
    share = torch.tensor(weights, dtype=torch.float64)
    torch.autograd.backward((losses * share).sum() / share.sum())
    errors = [
        (ours.grad.double() - twins[name].grad).norm() / twins[name].grad.norm()
        for name, ours in single.named_parameters()
        if ours.grad is not None
    ]
    assert len(errors) == 2 * 2 * 7
    return float(max(errors))


def pairs_of(plan: Plan, store: Store) -> list[Example]:
    reference, _ = key_of(plan, store, "base")
    return training_pairs(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read(store, "sequences"),
        read_logprobs(reference),
    )


def written_out(model: torch.nn.Module, pair: Example, beta: float) -> torch.Tensor:
    """DPO's loss of one pair: each reply by itself, through the model's own forward."""
    ratios = []
    for completion, reference in zip(pair.replies, pair.references, strict=True):
        ids = torch.tensor([[*pair.prompt_ids, *completion.ids]])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        picked = logprobs.gather(1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :, 0]
        ratios.append(picked.sum() - reference)
    return -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))


def audited(write_audited: Any, *overrides: str) -> tuple[Plan, Store]:
    path, said = write_audited(*overrides)
    plan, store = prepared(path, *said)
    score(plan, store, "theirs")
    compute_rewards(plan, store, "theirs")
    return plan, store


def test_rewards_of_other_pairs_are_refused(write_audited: Any, write_pairs: Any) -> None:
    overrides = ("objectives.dpo.where='theirs.margin > 0'",)
    path, said = write_audited(*overrides)
    plan, store = prepared(path, *said)
    with pytest.raises(StoreError, match="nothing has been published under 'rewards/theirs'"):
        train(plan, store, "dpo")
    plan, store = audited(write_audited, *overrides)
    train(plan, store, "dpo")
    write_pairs(16)
    plan, store = prepared(path, *said)
    with pytest.raises(TrainingError, match=r"'theirs', .* are of an earlier snapshot of pairs"):
        train(plan, store, "dpo")


def test_rewards_of_an_earlier_policy_are_refused(write_audited: Any) -> None:
    path, said = write_audited("objectives.ipo.where='dpo.margin > -100'")
    plan, store = prepared(path, *said)
    for step in (train, score, compute_rewards):
        step(plan, store, "dpo")
    train(plan, store, "ipo")
    again = load_plan(path, [*said, "training.seed=4"])
    train(again, store, "dpo")
    with pytest.raises(TrainingError, match=r"'dpo', .* are of an earlier policy"):
        train(again, store, "ipo")


def test_pairs_without_rewards_are_not_selected_and_said(
    write_audited: Any, caplog: pytest.LogCaptureFixture
) -> None:
    where = "objectives.dpo.where='theirs.margin > -100'"
    plan, store = audited(write_audited, where, "scoring.train_pairs=3")
    with caplog.at_level("INFO", logger="pipeline"):
        record = selected_pairs(plan, store, "dpo").record
    assert record.n_selected == 3
    assert record.n_null == record.n - 3 == record.null_in["theirs"]
    assert f"trained on 3 of {record.n} pairs, 0 left out, {record.n - 3} NULL" in caplog.text
    assert "scoring.train_pairs is 3" in caplog.text
