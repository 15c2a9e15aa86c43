"""Objectives that name objectives: their order, what is refused, and what a run will cost."""

from pathlib import Path
from typing import Any

import pytest

from assets.summary import beginning
from pipeline.errors import PlanError
from pipeline.estimate import estimate
from pipeline.plan import Plan, load_plan

WritePlan = Any
MODELS = {"sft": {"checkpoint": "some/model"}}


def plan_of(write_plan: WritePlan, **objectives: dict[str, Any]) -> Plan:
    said = {name: {"loss": "dpo", **values} for name, values in objectives.items()}
    path: Path = write_plan(models=MODELS, objectives=said)
    return load_plan(path, environment={})


def on(start: str, reference: str | None = None) -> dict[str, Any]:
    return {"start": start, "reference": reference or start}


def test_each_comes_after_those_it_needs(write_plan: WritePlan) -> None:
    plan = plan_of(
        write_plan, three=on("two", "one"), two=on("one"), other=on("sft"), one=on("sft")
    )
    assert list(plan.objectives) == ["one", "other", "three", "two"]
    assert plan.rounds == [["one", "other"], ["two"], ["three"]]
    assert plan.policies == ["one", "other", "two", "three"]
    assert plan.bases == {"one", "two"}
    assert plan.scored_models == ["sft"]
    assert plan.reference_of("three") == "one"
    plain = plan_of(write_plan, a=on("sft"), b=on("sft"))
    assert (plain.policies, plain.bases) == (["a", "b"], set()), "in the plan's own order"


def test_numerics_come_from_the_end_of_the_chain(write_plan: WritePlan) -> None:
    """Scored as the reference is, trained as the start was."""
    models = {
        "there": {"checkpoint": "some/model", "dtype": "bfloat16"},
        "here": {"checkpoint": "some/model", "dtype": "float32"},
    }
    objectives = {"one": on("here", "there"), "two": on("one"), "three": on("two", "here")}
    said = {name: {"loss": "dpo", **values} for name, values in objectives.items()}
    plan = load_plan(write_plan(models=models, objectives=said), environment={})
    scored = {name: plan.scored_as(name).dtype for name in objectives}
    assert scored == {"one": "bfloat16", "two": "bfloat16", "three": "float32"}
    assert {plan.trained_as(name).dtype for name in objectives} == {"float32"}


def test_without_a_reference_a_loss_is_reported_against_its_start(write_plan: WritePlan) -> None:
    plan = plan_of(write_plan, one=on("sft"), two={"loss": "simpo", "start": "one"})
    assert plan.reference_of("two") == "one"


@pytest.mark.parametrize(
    ("objectives", "says"),
    [
        ({"one": on("one")}, ["objectives.one.start: ", "one -> one"]),
        ({"one": on("sft", "one")}, ["objectives.one.reference: ", "one -> one"]),
        ({"one": on("two"), "two": on("one")}, ["in a circle, one -> two -> one", "start: "]),
        (
            {"one": on("sft", "three"), "two": on("one"), "three": on("sft", "two")},
            ["in a circle", "one -> three -> two -> one"],
        ),
    ],
)
def test_a_circle_is_named(
    write_plan: WritePlan, objectives: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(write_plan, **objectives)
    (line,) = str(caught.value).splitlines()
    named = line.replace("two -> one -> three", "one -> three -> two -> one")
    named = named.replace("three -> two -> one -> three", "one -> three -> two -> one")
    assert [words for words in says if words not in named] == [], line
    # The control: without the last edge it is a plan.
    first = next(iter(objectives))
    assert plan_of(write_plan, **{**objectives, first: on("sft")}).policies


@pytest.mark.parametrize("role", ["start", "reference"])
def test_an_unknown_name_is_refused_with_what_there_is(write_plan: WritePlan, role: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(write_plan, one=on("sft"), two={**on("one"), role: "zero"})
    assert f"objectives.two.{role}: 'zero' is not one of the models and objectives: " in str(
        caught.value
    )
    assert str(caught.value).endswith("sft, one, two")


def test_an_audit_names_models_only(write_plan: WritePlan) -> None:
    path = write_plan(
        models=MODELS,
        objectives={"one": {"loss": "dpo", **on("sft")}},
        audits={"theirs": {"reference": "one", "policy": "sft"}},
    )
    with pytest.raises(PlanError, match=r"audits\.theirs\.reference: 'one' is not one of the mod"):
        load_plan(path, environment={})


def test_the_estimate_counts_what_a_base_scores(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that others need is scored on everything, others on what they are reported on."""
    monkeypatch.setattr("pipeline.estimate._multiply_adds_per_second", lambda n: n * 1e6)
    dpo = {"loss": "dpo"}
    apart = {"one": {**dpo, **on("base")}, "two": {**dpo, **on("base")}}
    chain = {"one": {**dpo, **on("base")}, "two": {**dpo, **on("one")}}
    found = {
        name: estimate(load_plan(write_plan(objectives=said), ["scoring.train_pairs=0"]))
        for name, said in (("apart", apart), ("chain", chain))
    }
    tokens = {name: one.n_tokens_scored for name, one in found.items()}
    # Of 12 pairs 3 are held out: 12 + 3 + 3 against 12 + 12 + 3.
    assert tokens["chain"] / tokens["apart"] == pytest.approx(27 / 18, rel=1e-3)
    assert found["chain"].n_tokens_trained == found["apart"].n_tokens_trained
    side_by_side = ["scoring.train_pairs=0", "model_steps=2"]
    one_by_one, at_once = (
        estimate(load_plan(write_plan(objectives=chain), changes)).seconds
        for changes in (side_by_side[:1], side_by_side)
    )
    assert one_by_one == at_once, "a round waits for the one before"
    chain["two"]["loss"] = "kto"
    kto = estimate(load_plan(write_plan(objectives=chain), ["scoring.train_pairs=0"]))
    assert kto.n_tokens_scored > tokens["chain"], "mismatched replies, by the reference"


def test_what_a_run_is_about_to_do_names_the_rounds(write_plan: WritePlan) -> None:
    chain = {"a": {"loss": "dpo", **on("one")}, "one": {"loss": "dpo", **on("base")}}
    lines = beginning(load_plan(write_plan(objectives=chain))).splitlines()[1:]
    assert lines == [
        "  objective  one: dpo, beta 0.1",
        "  objective  a: dpo, beta 0.1, from one's policy, against one's policy",
    ]
