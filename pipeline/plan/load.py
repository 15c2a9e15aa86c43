"""Reading a plan's file and what overrides it.

Values come from the file, then `LOGRATIO__A__B=value` in the environment, then `a.b=value` from
the command line or Dagster's Launchpad; the later one wins. Values are YAML.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import PlanError
from pipeline.plan.explain import explain, fields
from pipeline.plan.models import ModelConfig
from pipeline.plan.sections import Plan, SourceConfig

ENVIRONMENT_PREFIX = "LOGRATIO__"


def load_plan(
    path: Path,
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """Read and validate a plan; relative paths in it are relative to the plan's file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` each, from the command line or the Launchpad.
        environment: `LOGRATIO__A__B` entries are read from here (default: the process's).

    Raises:
        PlanError: names the file (or where the override came from), the key, and what is allowed.
    """
    values = _read_yaml(path)
    origins: dict[str, str] = {}
    environment = os.environ if environment is None else environment
    for variable, key in _overriding(environment).items():
        origin = f"environment variable {variable}"
        _override(values, key, environment[variable], origin, origins)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise PlanError(f"override '{override}': write it as key=value, e.g. training.seed=1")
        _override(values, key, text, f"override '{override}'", origins)
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        raise PlanError(explain(error, path, origins)) from None
    return _resolve_paths(plan, path.resolve().parent)


def environment_overrides() -> list[str]:
    """What the process's environment changes in a plan, as `a.b=value` each, for the record."""
    return [f"{key}={os.environ[variable]}" for variable, key in _overriding(os.environ).items()]


def _overriding(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that override something, in order, and the key each overrides."""
    return {
        variable: variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        for variable in sorted(environment)
        if variable.startswith(ENVIRONMENT_PREFIX)
    }


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys silently; a plan must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *defaults`, whose keys the block may replace
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key '{key}' stands twice in one block, again at line {line}")
            seen.append(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: cannot be read: {error}") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise PlanError(f"{path}: is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise PlanError(f"{path}: a plan is a mapping; allowed keys: {fields(Plan)}")
    return values


def _override(
    values: dict[str, Any], key: str, text: str, origin: str, origins: dict[str, str]
) -> None:
    """Set a value, and note its origin under its key or under the first section it creates."""
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise PlanError(f"{origin}: the value is not YAML: {error}") from None
    *parents, last = key.split(".")
    if not all((*parents, last)):
        raise PlanError(f"{origin}: '{key}' is no key; write it like training.seed")
    made = key
    for depth, parent in enumerate(parents, start=1):
        if values.get(parent) is None:
            values[parent] = {}
            made = min(made, ".".join(parents[:depth]), key=len)
        values = values[parent]
        if not isinstance(values, dict):
            raise PlanError(f"{origin}: '{parent}' holds a value, not a section")
    values[last] = value
    origins.pop(made, None)  # so that the last one stands last
    origins[made] = origin


def _resolve_paths(plan: Plan, base: Path) -> Plan:
    written: dict[str, str] = {}

    def resolved(path: Path, whole: Path | None = None) -> Path:
        whole = whole or base / path
        written[str(whole)] = str(path)
        return whole

    def source(config: SourceConfig) -> SourceConfig:
        if "://" in str(config.path):
            return config
        return config.model_copy(update={"path": resolved(Path(config.path))})

    def model(config: ModelConfig) -> ModelConfig:
        update: dict[str, Any] = {}
        if config.adapter is not None:
            update["adapter"] = resolved(config.adapter)
        # A hub id looks like a relative path; it is one only if it exists or says so.
        local = base / config.checkpoint
        if config.checkpoint.startswith((".", "/")) or local.exists():
            written[str(local)] = config.checkpoint
            update["checkpoint"] = str(local)
        return config.model_copy(update=update)

    plan = plan.model_copy(
        update={
            "store": resolved(plan.store, (base / plan.store).resolve()),
            "sources": {name: source(config) for name, config in plan.sources.items()},
            "evaluation": {name: source(config) for name, config in plan.evaluation.items()},
            "models": {name: model(config) for name, config in plan.models.items()},
        }
    )
    plan._written = written
    return plan
