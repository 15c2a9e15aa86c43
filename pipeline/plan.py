"""The plan: one YAML file that says what to read, score, train and report.

Values come from the file, then `LOGRATIO__A__B=value` in the environment, then `a.b=value` from
the command line or Dagster's Launchpad; the later one wins. Values are YAML.
"""

import datetime
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline import losses
from pipeline.errors import PlanError
from pipeline.ids import content_id

ENVIRONMENT_PREFIX = "LOGRATIO__"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
"""A name is a path and a Dagster key at once: lower-case letters, digits and underscores."""

_NAME_RULE = (
    "a name is lower-case letters, digits and underscores, begins with a letter "
    "and is at most 64 long"
)
_TAKEN = ("dagster", "ledger", "models", "policies")
"""What stands in the store beside the plans' own folders (`pipeline.store.Store`)."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceConfig(_Section):
    """Where preference data is and what shape it has."""

    path: Path
    shape: Literal["conversational", "hh"]


class TokenizationConfig(_Section):
    """How messages become token ids; every field is part of the tokenisation's id."""

    max_length: int = Field(default=2048, ge=2)
    over_long: Literal["quarantine", "keep_start"] = "quarantine"
    completion_tail: Literal["template", "eos"] = "template"
    control_tokens: Literal["literal", "allow", "reject"] = "literal"
    pinned_date: str | None = None

    @field_validator("pinned_date", mode="before")
    @classmethod
    def _pinned_date_is_a_date(cls, value: object) -> object:
        if isinstance(value, datetime.date):  # YAML's reading of an unquoted date
            return value.isoformat()[:10]
        if isinstance(value, str):
            try:
                if datetime.date.fromisoformat(value).isoformat() == value:
                    return value
            except ValueError:
                pass
            raise ValueError(f"'{value}' is not a date, YYYY-MM-DD")
        return value


class SplitConfig(_Section):
    """The held-out share of prompts. Another salt is another split."""

    test_share: float = Field(default=0.2, ge=0, lt=1)
    salt: str = Field(default="logratio", min_length=1, max_length=64)


class ModelConfig(_Section):
    """A checkpoint (directory, hub id or `packaged:smollm2-135m-instruct`) and its numerics."""

    checkpoint: str = Field(min_length=1)
    adapter: Path | None = None
    engine: Literal["torch"] = "torch"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"


class ObjectiveConfig(_Section):
    """A loss with its values, the reference it is measured against and the model it starts from."""

    loss: str
    beta: float = Field(default=0.1, gt=0)
    reference: Name
    start: Name

    @field_validator("loss")
    @classmethod
    def _loss_is_known(cls, loss: str) -> str:
        if loss not in losses.REGISTRY:
            raise ValueError(f"'{loss}' is not one of {', '.join(losses.REGISTRY)}")
        return loss


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: str | list[str] = "all-linear"


class TrainingConfig(_Section):
    """Optimiser and schedule, shared by all objectives."""

    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="Ends training earlier.")
    batch_pairs: int = Field(default=8, ge=1, description="Pairs per optimiser step.")
    learning_rate: float = Field(default=5e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    lora: LoraConfig = LoraConfig()


class ScoringConfig(_Section):
    """How scoring is cut up and checked. Nothing here changes an id."""

    commit_rows: int = Field(default=64, ge=1, description="Sequences per committed part.")
    batch_tokens: int = Field(
        default=0, ge=0, description="Tokens per forward pass; 0: one sequence (a CPU's best)."
    )
    null_test: Literal["when_scored", "always"] = "when_scored"
    null_test_rows: int = Field(default=8, ge=1)
    null_test_tolerance: float = Field(default=1e-3, gt=0, description="Nats per sequence.")


class ReportConfig(_Section):
    """What the report applies to every policy alike."""

    beta: float = Field(default=0.1, gt=0)


class Plan(_Section):
    """A whole plan; see `plans/` for commented ones."""

    name: Name
    store: Path = Path("../store")
    sources: dict[Name, SourceConfig] = Field(min_length=1)
    evaluation: dict[Name, SourceConfig] = {}
    limit_pairs: int | None = Field(
        default=None, ge=1, description="Go on with this many pairs, chosen by their ids' hash."
    )
    split: SplitConfig = SplitConfig()
    tokenization: TokenizationConfig = TokenizationConfig()
    models: dict[Name, ModelConfig] = Field(min_length=1)
    objectives: dict[Name, ObjectiveConfig] = {}
    training: TrainingConfig = TrainingConfig()
    scoring: ScoringConfig = ScoringConfig()
    report: ReportConfig = ReportConfig()
    _written: dict[str, str] = PrivateAttr(default_factory=dict)
    """Paths after `load_plan` has resolved them, and as the plan writes them."""

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in _TAKEN:
            raise ValueError(f"'{name}' is taken in every store, as are {', '.join(_TAKEN)}")
        return name

    @model_validator(mode="after")
    def _names_agree(self) -> "Plan":
        for name, objective in self.objectives.items():
            for field in ("reference", "start"):
                named = getattr(objective, field)
                if named not in self.models:
                    raise _fault(
                        f"objectives.{name}.{field}",
                        f"'{named}' is not one of the models: {', '.join(self.models)}",
                    )
        for section, what, left, right in (
            ("objectives", "a model and an objective", self.models, self.objectives),
            ("evaluation", "a source and an evaluation source", self.sources, self.evaluation),
        ):
            if both := sorted(set(left) & set(right)):
                raise _fault(f"{section}.{both[0]}", f"names {what}; names must differ")
        return self

    @property
    def digest(self) -> str:
        """An id of everything the plan says but its store; paths count as written."""
        said = self.model_dump(mode="json", exclude={"store"})
        return content_id("plan", _as_written(said, self._written))


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
    for variable in sorted(environment):
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
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
        raise PlanError(_explain(error, path, origins)) from None
    return _resolve_paths(plan, path.resolve().parent)


def _fault(key: str, message: str) -> PydanticCustomError:
    """An error about a key below the section that finds it."""
    return PydanticCustomError("fault", "{message}", {"key": key, "message": message})


def _as_written(value: Any, written: Mapping[str, str]) -> Any:
    match value:
        case dict():
            return {key: _as_written(item, written) for key, item in value.items()}
        case list():
            return [_as_written(item, written) for item in value]
        case str():
            return written.get(value, value)
    return value


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
        raise PlanError(f"{path}: a plan is a mapping; allowed keys: {_fields(Plan)}")
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


def _explain(error: ValidationError, path: Path, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        context = problem.get("ctx", {})
        location = _location(problem["loc"])
        key = context.get("key") or ".".join(location)
        named = [origin for k, origin in origins.items() if f"{key}.".startswith(f"{k}.")]
        message = _message(problem["type"], problem["msg"], problem["input"], location)
        lines.append(f"{named[-1] if named else path}: {key}: {message}")
    return "\n".join(lines)


def _location(found: tuple[int | str, ...]) -> list[str]:
    """Where a fault is, without the words Pydantic adds below a value for its own use."""
    parts = [str(part) for part in found]
    for depth in range(1, len(parts)):
        if _section(parts[:depth]) is None:
            return parts[:depth]
    return [part for part in parts if part != "[key]"]


def _message(kind: str, message: str, value: object, location: list[str]) -> str:
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    section = _section(location[:-1] if kind == "extra_forbidden" else location)
    keys = _fields(section) if section else "none here"
    match kind:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return f"unknown key; allowed: {keys}"
        case "model_type":
            return f"{shown} is no section; allowed keys: {keys}"
        case "dict_type":
            return f"{shown} is no section; it maps names to sections of {keys}"
        case "string_pattern_mismatch":
            return f"{shown}: {_NAME_RULE}"
    return message.removeprefix("Value error, ").replace("Input should", f"{shown} should")


def _section(location: list[str]) -> type[BaseModel] | None:
    """The plan section a location points into."""
    section: type[BaseModel] = Plan
    parts = iter(location)
    for part in parts:
        field = section.model_fields.get(part)
        if field is None:
            return None
        kinds = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        nested = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if nested is None:
            return None
        section = nested
        if get_args(field.annotation):
            next(parts, None)  # a map of sections: skip the entry's own name
    return section


def _fields(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)


def _resolve_paths(plan: Plan, base: Path) -> Plan:
    written: dict[str, str] = {}

    def resolved(path: Path, whole: Path | None = None) -> Path:
        whole = whole or base / path
        written[str(whole)] = str(path)
        return whole

    def source(config: SourceConfig) -> SourceConfig:
        return config.model_copy(update={"path": resolved(config.path)})

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
