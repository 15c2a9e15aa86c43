"""The plan: what is refused, and that every refusal says where, what and what is allowed."""

import copy
import datetime
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import losses
from pipeline.errors import PlanError
from pipeline.plan import Plan, load_plan

MINIMAL: dict[str, Any] = {
    "name": "small",
    "sources": {"hh": {"path": "data/hh.jsonl", "shape": "hh"}},
    "models": {"sft": {"checkpoint": "some/model"}},
    "objectives": {"dpo": {"loss": "dpo", "reference": "sft", "start": "sft"}},
}
Change = Callable[[dict[str, Any]], object]


def write(directory: Path, change: Change = lambda plan: None) -> Path:
    plan = copy.deepcopy(MINIMAL)
    change(plan)
    path = directory / "plan.yaml"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    return path


def load(path: Path, *overrides: str, **environment: str) -> Plan:
    return load_plan(path, overrides, environment)


def refusal(path: Path, *overrides: str, **environment: str) -> str:
    with pytest.raises(PlanError) as caught:
        load(path, *overrides, **environment)
    return str(caught.value)


def put(value: object, *keys: str) -> Change:
    def change(plan: dict[str, Any]) -> None:
        for key in keys[:-1]:
            plan = plan.setdefault(key, {})
        plan[keys[-1]] = value

    return change


def test_a_minimal_plan_and_its_defaults(tmp_path: Path) -> None:
    plan = load(write(tmp_path))
    assert plan.objectives["dpo"].values == {"beta": 0.1}
    assert plan.training.learning_rate == 5e-5
    assert plan.tokenization.control_tokens == "literal"
    assert plan.evaluation == {}


@pytest.mark.parametrize(
    ("change", "key", "allowed"),
    [
        (put(1, "modells"), "modells", ["unknown key", "models", "objectives", "training"]),
        (put(1, "training", "sed"), "training.sed", ["unknown key", "seed", "learning_rate"]),
        (
            put(1, "training", "lora", "rnk"),
            "training.lora.rnk",
            ["unknown key", "allowed: rank, alpha, target_modules"],
        ),
        (
            put("x", "models", "sft", "engin"),
            "models.sft.engin",
            ["unknown key", "allowed: checkpoint, adapter, engine, dtype, attention"],
        ),
        (
            put("jsonl", "sources", "hh", "shape"),
            "sources.hh.shape",
            ["hh, openai,", "'jsonl'"],
        ),
        (
            put("float64", "models", "sft", "dtype"),
            "models.sft.dtype",
            ["'float32'", "'bfloat16'", "'float16'", "'float64'"],
        ),
        (
            put("dop", "objectives", "dpo", "loss"),
            "objectives.dpo.loss",
            ["'dop'", *losses.REGISTRY],
        ),
        (
            put("base", "objectives", "dpo", "reference"),
            "objectives.dpo.reference",
            ["'base'", "sft"],
        ),
        (put("base", "objectives", "dpo", "start"), "objectives.dpo.start", ["'base'", "sft"]),
        (put({"checkpoint": "x"}, "models", "My model"), "models.My model", ["lower-case"]),
        (put("Upper", "name"), "name", ["'Upper'", "lower-case letters, digits and underscores"]),
        (put("a" * 65, "name"), "name", ["64"]),
        (put(1.5, "split", "test_share"), "split.test_share", ["less than 1", "1.5"]),
        (put("fast", "training", "learning_rate"), "training.learning_rate", ["number", "'fast'"]),
        (put(math.inf, "training", "learning_rate"), "training.learning_rate", ["finite"]),
        (put(math.nan, "report", "beta"), "report.beta", []),
        (put(0, "objectives", "dpo", "beta"), "objectives.dpo.beta", ["greater than 0", "0"]),
        (put(3, "training", "lora", "target_modules"), "training.lora.target_modules", ["list"]),
        (put(None, "training"), "training", ["epochs", "seed"]),
        (put([1], "training"), "training", ["epochs", "seed"]),
        (put(None, "models"), "models", []),
        (put({}, "sources"), "sources", ["there is none", "evaluation"]),
        (lambda plan: plan.pop("sources"), "sources", ["there is none", "evaluation"]),
        (
            put({"reference": "sft", "policy": "b"}, "audits", "theirs"),
            "audits.theirs.policy",
            ["'b'", "sft"],
        ),
        (
            put({"reference": "sft", "policy": "sft"}, "audits", "dpo"),
            "audits.dpo",
            ["an objective and an audit"],
        ),
        (
            put({"engine": "vllm", "policies": ["ppo"]}, "scoring", "parity"),
            "scoring.parity.policies",
            ["'ppo'", "dpo"],
        ),
        (lambda plan: plan["sources"]["hh"].pop("path"), "sources.hh.path", ["required"]),
        (lambda plan: plan["objectives"]["dpo"].pop("start"), "objectives.dpo.start", ["required"]),
        (
            put("2024-13-45", "tokenization", "pinned_date"),
            "tokenization.pinned_date",
            ["2024-13-45", "YYYY-MM-DD"],
        ),
        (put("today", "tokenization", "pinned_date"), "tokenization.pinned_date", ["YYYY-MM-DD"]),
        (
            put(MINIMAL["objectives"]["dpo"], "objectives", "sft"),
            "objectives.sft",
            ["a model and an objective"],
        ),
        (
            put(MINIMAL["sources"]["hh"], "evaluation", "hh"),
            "evaluation.hh",
            ["a source and an evaluation source"],
        ),
        (put("ledger", "name"), "name", ["'ledger'", "policies"]),
        (put("models", "name"), "name", ["'models'"]),
    ],
)
def test_a_refusal_names_file_key_and_what_is_allowed(
    tmp_path: Path, change: Change, key: str, allowed: list[str]
) -> None:
    path = write(tmp_path, change)
    message = refusal(path)
    for line in message.splitlines():
        assert line.startswith(f"{path}: {key}: ")
    assert [
        words for words in allowed if words not in message.replace(f"{path}: {key}: ", "")
    ] == []
    # Written for a person: no pydantic vocabulary, no regular expression.
    assert not re.search(r"Input should|instance of|pattern|type=|\[a-z", message), message


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, lambda p: p.update(nme="x", models={"sft": {"dtype": "float32"}}))
    lines = refusal(path).splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == ["models.sft.checkpoint", "nme"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"name: [", ["is not YAML", "line 1"]),
        (b"name: a\n\tb: c\n", ["is not YAML", "line 2"]),
        (b"- name\n", ["a plan is a mapping", "sources"]),
        (b"", ["a plan is a mapping"]),
        (b"just text", ["a plan is a mapping"]),
        (b"\xff\xfe", ["cannot be read"]),
        (b"name: a\nstore: x\nname: b\n", ["'name' stands twice", "line 3"]),
        (b"name: a\nmodels:\n  m: {checkpoint: a}\n  m: {checkpoint: b}\n", ["'m'", "line 4"]),
        (b"a: !!python/object/apply:os.getcwd []\n", ["is not YAML", "line 1"]),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: bytes, says: list[str]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert [words for words in says if words not in message] == []


def test_a_missing_file_is_named_once(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.yaml")
    assert message == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"


def test_yaml_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: small\n"
        "sources: {hh: {path: a, shape: hh}}\n"
        "models:\n"
        "  sft: &sft {checkpoint: some/model, dtype: float32}\n"
        "  half: {<<: *sft, dtype: bfloat16}\n"
    )
    models = load(path).models
    assert models["half"].checkpoint == "some/model"
    assert [models[name].dtype for name in ("sft", "half")] == ["float32", "bfloat16"]


def test_a_date_needs_no_quotes(tmp_path: Path) -> None:
    """YAML reads 2024-07-04 as a date."""
    path = write(tmp_path, put(datetime.date(2024, 7, 4), "tokenization", "pinned_date"))
    assert "'2024-07-04'" not in path.read_text()
    assert load(path).tokenization.pinned_date == "2024-07-04"
    assert (
        load(path, "tokenization.pinned_date=2025-01-31").tokenization.pinned_date == "2025-01-31"
    )


def test_later_values_win(tmp_path: Path) -> None:
    path = write(tmp_path, put(1, "training", "seed"))
    variable = {"LOGRATIO__TRAINING__SEED": "2", "UNRELATED": "9", "LOGRATIO_PLANS": "9"}
    assert load(path).training.seed == 1
    assert load(path, **variable).training.seed == 2
    assert load(path, "training.seed=3", **variable).training.seed == 3
    assert load(path, "training.seed=3", "training.seed=4", **variable).training.seed == 4


def test_the_process_environment_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGRATIO__TRAINING__SEED", "7")
    assert load_plan(write(tmp_path)).training.seed == 7
    assert load_plan(write(tmp_path), environment={}).training.seed == 0


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.learning_rate=1e-5", 1e-5),  # a string to YAML 1.1
        ("training.learning_rate=0.5", 0.5),
        ("training.max_steps=3", 3),
        ("training.max_steps=null", None),
        ("training.lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("training.lora.target_modules=q_proj", "q_proj"),
        ("models.sft.dtype=bfloat16", "bfloat16"),
        ("models.new={checkpoint: a/b, dtype: float16}", "float16"),
        ("models.new.checkpoint=a=b", "a=b"),
        ("split.salt='1'", "1"),
    ],
)
def test_overrides_of_every_kind(tmp_path: Path, override: str, value: object) -> None:
    plan = load(write(tmp_path), override)
    key = override.partition("=")[0]
    key = "models.new.dtype" if override.startswith("models.new={") else key
    found: Any = plan
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_an_override_fills_an_empty_section(tmp_path: Path) -> None:
    path = write(tmp_path, put(None, "training"))
    assert load(path, "training.seed=5").training.seed == 5


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("training.sed=1", "training.sed", "unknown key; allowed: method, epochs"),
        ("training.seed=-1", "training.seed", "-1"),
        ("training={sed: 1}", "training.sed", "unknown key"),
        ("sed=1", "sed", "unknown key"),
        ("objectives.dpo.loss=zzz", "objectives.dpo.loss", "'zzz'"),
        ("objectives.dpo.reference=zzz", "objectives.dpo.reference", "'zzz'"),
        ("objectives.new.loss=dpo", "objectives.new.reference", "required"),
        ("models.A.checkpoint=x", "models.A", "lower-case"),
    ],
)
def test_a_refused_override_is_named_and_not_the_file(
    tmp_path: Path, override: str, key: str, says: str
) -> None:
    message = refusal(write(tmp_path), override).splitlines()[0]
    assert message.startswith(f"override '{override}': {key}: ")
    assert says in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.seed", "key=value"),
        ("=1", "training.seed"),
        ("a..b=1", "'a..b' is no key"),
        ("name.x=1", "'name' holds a value"),
        ("name=[", "not YAML"),
        ("training={seed: 1, seed: 2}", "'seed' stands twice"),
    ],
)
def test_an_override_that_is_none(tmp_path: Path, override: str, says: str) -> None:
    message = refusal(write(tmp_path), override)
    assert message.startswith(f"override '{override}': ")
    assert says in message


def test_a_refused_variable_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    name = "LOGRATIO__TRAINING__SED"
    assert refusal(path, **{name: "1"}).startswith(f"environment variable {name}: training.sed: ")
    assert "is no key" in refusal(path, LOGRATIO__="1")
    # Of two that set one key, the one that won is the one to mend.
    variable = {"LOGRATIO__TRAINING__SEED": "-1"}
    assert refusal(path, "training.seed=-2", **variable).startswith("override 'training.seed=-2'")
    assert refusal(path, "training.epochs=1", **variable).startswith("environment variable")
    # A fault in the file is not blamed on an override of something else.
    path = write(tmp_path, put(1, "training", "sed"))
    assert refusal(path, "training.seed=1").startswith(f"{path}: training.sed: ")


def test_paths_are_relative_to_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "plans"
    (home / "local").mkdir(parents=True)
    monkeypatch.chdir("/")

    def change(plan: dict[str, Any]) -> None:
        plan["store"] = "../out"
        plan["evaluation"] = {"held": {"path": "/abs/e.jsonl", "shape": "hh"}}
        plan["models"]["sft"]["adapter"] = "adapters/a"
        plan["models"] |= {
            "here": {"checkpoint": "local"},
            "dotted": {"checkpoint": "./none"},
            "packaged": {"checkpoint": "packaged:smollm2-135m-instruct"},
        }

    plan = load(write(home, change))
    assert plan.store == tmp_path / "out"
    assert plan.sources["hh"].path == home / "data/hh.jsonl"
    assert plan.evaluation["held"].path == Path("/abs/e.jsonl")
    assert plan.models["sft"].adapter == home / "adapters/a"
    assert {name: model.checkpoint for name, model in plan.models.items()} == {
        "sft": "some/model",
        "here": str(home / "local"),
        "dotted": str(home / "none"),
        "packaged": "packaged:smollm2-135m-instruct",
    }


def leaves(value: Any, *keys: str) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, *keys, key)]
    return [(keys, value)]


OTHER: dict[str, object] = {
    "name": "other", "path": "other", "shape": "conversational", "over_long": "keep_start",
    "completion_tail": "eos", "control_tokens": "allow", "pinned_date": "2024-07-04",
    "checkpoint": "other", "adapter": "other", "dtype": "bfloat16", "attention": "eager",
    "schedule": "cosine", "target_modules": ["q_proj"], "null_test": "always", "salt": "other",
    "store": "other", "evaluation": {"e": {"path": "e", "shape": "hh"}},
    "pairing": "all", "score": "other", "columns": {"chosen": "other"}, "rules": {"tied": "flag"},
    "engine": "vllm", "loss": "ipo", "head_dtype": "model", "attention_backend": "FLASH_ATTN",
    "reference_correction": "never", "parity": {"engine": "vllm"},
    "token_extras": ["entropy"], "method": "full", "best_metric": "eval_rewards/margins",
    "log_to": ["tensorboard"],
    "where": "votes > 1", "weight": "votes", "retrain": "never",
    "losses": ["dpo"], "audits": {"theirs": {"reference": "sft", "policy": "two"}},
}  # fmt: skip
"""Another valid value for each key that is not a number."""

NAMES = {("objectives", "dpo", "reference"), ("objectives", "dpo", "start")}


def another(keys: tuple[str, ...], value: Any) -> object:
    """A valid value for a key that is not the one it has."""
    if keys in NAMES:
        return "two"
    if keys[-1] in OTHER:
        return OTHER[keys[-1]]
    if isinstance(value, list):
        return [*value, 0.4]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 or 0.5
    return 2 if value is None else value + 1


def test_the_digest_changes_with_every_value_and_not_with_the_place(tmp_path: Path) -> None:
    def change(sections: dict[str, Any]) -> None:
        put("other/model", "models", "two", "checkpoint")(sections)
        put(5, "training", "evaluate_every")(sections)  # what others need

    plan = load(write(tmp_path, change))
    (tmp_path / "moved" / "there").mkdir(parents=True)
    assert load(write(tmp_path / "moved/there", change)).digest == plan.digest
    assert load(write(tmp_path, change)).digest == plan.digest
    assert plan.model_copy(update={"limit_pairs": 3}).digest != plan.digest

    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(
        yaml.safe_dump({**yaml.safe_load((tmp_path / "plan.yaml").read_text()), "store": "x"})
    )
    assert load(elsewhere).digest == plan.digest
    every = leaves(plan.model_dump(mode="json", exclude={"store"}))
    assert len(every) > 35
    digests = {plan.digest}
    changed = 1
    for keys, value in every:
        if keys[0] == "objectives" and value is None:
            continue  # a value this loss has no use for
        if keys == ("scoring", "accept_equivalent"):
            continue  # not beside objectives; see tests/scoring/ledger/test_differences.py
        put(another(keys, value), *keys)(
            varied := yaml.safe_load(write(tmp_path, change).read_text())
        )
        path = tmp_path / "varied.yaml"
        path.write_text(yaml.safe_dump(varied))
        digests.add(load(path).digest)
        changed += 1
        assert len(digests) == changed, f"{'.'.join(keys)} does not count"


def objective(**values: object) -> Change:
    return put({"reference": "sft", "start": "sft", **values}, "objectives", "it")


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_every_loss_can_be_planned_with_its_defaults_or_says_what_it_lacks(
    tmp_path: Path, name: str
) -> None:
    spec, path = losses.REGISTRY[name], write(tmp_path, objective(loss=name))
    lacking = [losses.NEEDS[n] for n in spec.needs if not losses.NEEDS[n].trained]
    if lacking:
        message = refusal(path)
        assert f"objectives.it.loss: {name} cannot be trained yet: it needs" in message
        assert lacking[0].what in message
        return
    config = load(path).objectives["it"]
    assert config.values == spec.defaults
    assert config.kl_partner == ("ring" if spec.needs_kl else None)
    for key, value in spec.defaults.items():
        assert f"{key} {value:g}" in str(config), "defaults are shown"


@pytest.mark.parametrize(
    ("said", "key", "says"),
    [
        ({"loss": "dpo", "gamma": 1}, "gamma", "the loss dpo has none; it has beta"),
        ({"loss": "dpo", "bta": 1}, "bta", "unknown key; allowed: loss"),
        ({"loss": "cdpo", "label_smoothing": 0.5}, "label_smoothing", "less than 0.5"),
        ({"loss": "dpo", "kl_partner": "ring"}, "kl_partner", "the loss dpo has none"),
        ({"loss": 3}, "loss", "3 is no loss"),
        ({"loss": {}}, "loss", "one term at least"),
        ({"loss": {"zzz": 1}}, "loss", "'zzz' is not one of dpo"),
        ({"loss": {"dpo": -1}}, "loss.dpo.weight", "-1 should be greater than 0"),
        ({"loss": {"dpo": {"beta": 0}}}, "loss.dpo.beta", "0 should be greater than 0"),
        ({"loss": {"dpo": 1}, "beta": 0}, "beta", "0 should be greater than 0"),
        ({"loss": {"dpo": {"gamma": 1}}}, "loss.dpo.gamma", "allowed: weight, beta"),
        ({"loss": {"dpo": 1, "nll_sum": 1}, "gamma": 1}, "gamma", "has none; it has beta"),
        ({"loss": {"dpo": 1, "wpo": 1}}, "loss", "dpo + wpo cannot be trained yet"),
    ],
)
def test_an_objective_that_is_none(
    tmp_path: Path, said: dict[str, object], key: str, says: str
) -> None:
    path = write(tmp_path, objective(**said))
    message = refusal(path)
    assert message.startswith(f"{path}: objectives.it.{key}: ")
    assert says in message


def test_a_sum_deals_out_what_stands_beside_it(tmp_path: Path) -> None:
    terms: dict[str, object] = {"dpo": 1, "simpo": {"weight": 0.2, "beta": 4}, "nll_mean": 0.5}
    config = load(write(tmp_path, objective(loss=terms, beta=0.3))).objectives["it"]
    assert config.values == {
        "dpo.weight": 1.0,
        "dpo.beta": 0.3,
        "simpo.weight": 0.2,
        "simpo.beta": 4.0,
        "simpo.gamma": 1.0,
        "nll_mean.weight": 0.5,
    }
    assert "dpo.beta 0.3" in str(config)
    spelled = load(write(tmp_path, objective(loss=config.model_dump()["loss"])))
    assert spelled.objectives["it"].values == config.values
    override = "objectives.it.loss.dpo=2"
    path = write(tmp_path, objective(loss=terms, beta=0.3))
    assert load(path, override).objectives["it"].values["dpo.weight"] == 2.0
