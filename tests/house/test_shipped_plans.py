"""The plans that come with the project, held against the code."""

import yaml
from support import PROJECT

from pipeline.losses import REGISTRY
from pipeline.plan import ModelConfig, ObjectiveConfig, Plan, SourceConfig, load_plan


def test_the_template_shows_every_key_with_its_default() -> None:
    template = PROJECT / "plans" / "templates" / "everything.yaml"
    said = yaml.safe_load(template.read_text())
    plan = load_plan(template, environment={})
    given = plan.model_dump(mode="json", exclude={"store", "sources", "models"})
    assert {k: v for k, v in said.items() if k in given and k != "objectives"} == {
        k: v for k, v in given.items() if k != "objectives"
    }
    # A loss has only its own values; all of them together show every key, and a sum of losses.
    objectives = [
        {k: v for k, v in values.items() if v is not None}
        for values in given["objectives"].values()
    ]
    assert list(said["objectives"].values()) == objectives
    parameters = {key for o in plan.objectives.values() for key in o.values if "." not in key}
    shown = {key for values in objectives for key in values}
    assert shown == {*ObjectiveConfig.model_fields, *parameters}
    single = {values["loss"] for values in objectives if isinstance(values["loss"], str)}
    assert single < REGISTRY.keys()
    assert any(isinstance(values["loss"], dict) for values in objectives)
    assert said["sources"]["pairs"].keys() == SourceConfig.model_fields.keys()
    assert said["models"]["sft"].keys() == ModelConfig.model_fields.keys()
    for section in ("split", "tokenization", "training", "scoring", "report"):
        default = Plan.model_fields[section].default.model_dump(mode="json")
        assert said[section] == default, section
    sft = said["models"]["sft"]
    assert sft == ModelConfig(checkpoint=sft["checkpoint"]).model_dump(mode="json")


def test_the_shipped_plans_load() -> None:
    plans = sorted((PROJECT / "plans").glob("*.yaml"))
    assert PROJECT / "plans/demo.yaml" in plans
    for path in plans:
        assert load_plan(path, environment={}).name == path.stem
