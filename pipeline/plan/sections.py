"""What a plan may say: its sections, their defaults and their limits."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from pipeline.ids import content_id
from pipeline.plan.faults import SECTION, Name, fault
from pipeline.plan.models import ModelConfig
from pipeline.plan.objective import ObjectiveConfig
from pipeline.plan.report import ReportConfig
from pipeline.plan.rounds import bases, rounds
from pipeline.plan.scoring import ScoringConfig
from pipeline.plan.selection import require_selectable
from pipeline.plan.training import TrainingConfig, require_shardable
from pipeline.rules import RULES, Action, actions
from pipeline.sources import READERS, Pairing, ReadOptions

_TAKEN = ("dagster", "ledger", "models", "policies")
"""What stands in the store beside the plans' own folders (`pipeline.store.Store`)."""


class _Section(BaseModel):
    model_config = SECTION


class SourceConfig(_Section):
    """Where preference data is, what shape it has, and how it is to be read."""

    path: Path | str = Field(description="File, folder, glob or URL (s3://, hf://, ...).")
    shape: str | None = Field(default=None, description="null: found from the first rows.")
    pairing: Pairing = Field(
        default="best_worst", description="Which pairs are made of a ranked list."
    )
    min_gap: float = Field(
        default=0.0, ge=0, description="Scores less apart than this state no preference."
    )
    score: str | None = Field(default=None, description="What ranks; null: the shape's own.")
    columns: dict[str, str] = Field(
        default={}, description="The shape's name of a field to the source's, where they differ."
    )

    @field_validator("shape")
    @classmethod
    def _shape_is_known(cls, shape: str | None) -> str | None:
        if shape is not None and shape not in READERS:
            raise ValueError(f"'{shape}' is not one of {', '.join(READERS)}")
        return shape

    @property
    def options(self) -> ReadOptions:
        """What a reader is told."""
        return ReadOptions(self.pairing, self.min_gap, self.score, dict(self.columns))


class RuleConfig(_Section):
    """What a plan says about one rule of `pipeline.rules`; a lone word is the action."""

    action: Action | None = Field(default=None, description="null: the rule's default.")
    at_most: float | None = Field(
        default=None, ge=0, le=1, description="A larger share of the rows fails a check."
    )

    @model_validator(mode="before")
    @classmethod
    def _a_word_is_the_action(cls, given: Any) -> Any:
        if given is False:  # YAML's reading of an unquoted off
            given = "off"
        return {"action": given} if isinstance(given, str) else given


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


class AuditConfig(_Section):
    """A policy that was trained elsewhere, to be reported against a reference; both are models.

    The policy is scored in the reference's numerics, whatever its own are.
    """

    reference: Name
    policy: Name


class Plan(_Section):
    """A whole plan; see `plans/` for commented ones."""

    name: Name
    store: Path = Path("../store")
    sources: dict[Name, SourceConfig] = {}
    evaluation: dict[Name, SourceConfig] = {}
    limit_pairs: int | None = Field(
        default=None, ge=1, description="Go on with this many pairs (and labels), chosen by hash."
    )
    rules: dict[str, RuleConfig] = {}
    split: SplitConfig = SplitConfig()
    tokenization: TokenizationConfig = TokenizationConfig()
    models: dict[Name, ModelConfig] = Field(min_length=1)
    objectives: dict[Name, ObjectiveConfig] = {}
    audits: dict[Name, AuditConfig] = {}
    training: TrainingConfig = TrainingConfig()
    scoring: ScoringConfig = ScoringConfig()
    report: ReportConfig = ReportConfig()
    model_steps: int = Field(
        default=1,
        ge=1,
        description="Steps of a run that may hold a model at one time. On a CPU they share its "
        "cores, which small models use better one by one.",
    )
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
        if not self.sources and not self.evaluation:
            raise fault("sources", "there is none, and no evaluation source either")
        either: Mapping[str, Any] = {**self.models, **self.objectives}
        said: list[tuple[str, str, Mapping[str, Any]]] = [
            (f"objectives.{name}.{role}", getattr(objective, role), either)
            for role in ("reference", "start")
            for name, objective in self.objectives.items()
        ]
        said += [
            (f"audits.{name}.{role}", getattr(audit, role), self.models)
            for role in ("reference", "policy")
            for name, audit in self.audits.items()
        ]
        for key, name, known in said:
            if name not in known:
                kinds = "models and objectives" if known is either else "models"
                raise fault(key, f"'{name}' is not one of the {kinds}: {', '.join(known)}")
        for section, what, left, right in (
            ("objectives", "a model and an objective", self.models, self.objectives),
            ("audits", "a model and an audit", self.models, self.audits),
            ("audits", "an objective and an audit", self.objectives, self.audits),
            ("evaluation", "a source and an evaluation source", self.sources, self.evaluation),
        ):
            if both := sorted(set(left) & set(right)):
                raise fault(f"{section}.{both[0]}", f"names {what}; names must differ")
        policies = self.policies  # objectives that go round in a circle are refused here
        for policy in (self.scoring.parity and self.scoring.parity.policies) or ():
            if policy not in policies:
                known_policies = ", ".join(policies)
                raise fault("scoring.parity.policies", f"'{policy}' is not one of {known_policies}")
        return self

    @model_validator(mode="after")
    def _equivalents_are_for_audits(self) -> "Plan":
        if self.scoring.accept_equivalent is not None and (self.objectives or self.scoring.parity):
            raise fault(
                "scoring.accept_equivalent",
                "is for plans without objectives and parity: what is trained or compared is "
                "computed in the numerics of today",
            )
        return self

    @model_validator(mode="after")
    def _extras_can_be_computed(self) -> "Plan":
        if self.scoring.token_extras:
            for policy in self.policies:
                if self.models[name := self.reference_of(policy)].engine == "vllm":
                    raise fault(
                        "scoring.token_extras",
                        f"'{policy}' is scored as its reference '{name}' is, by vLLM, and only "
                        "the torch engine computes them",
                    )
        return self

    @model_validator(mode="after")
    def _starts_can_be_sharded(self) -> "Plan":
        starts = {objective.start for objective in self.objectives.values()}
        require_shardable(self.training, {name: self.trained_as(name).dtype for name in starts})
        return self

    @model_validator(mode="after")
    def _pairs_can_be_selected(self) -> "Plan":
        require_selectable(self)
        return self

    @model_validator(mode="after")
    def _rules_are_known(self) -> "Plan":
        for name, said in self.rules.items():
            if name not in RULES:
                raise fault(f"rules.{name}", f"there is no such rule; rules: {', '.join(RULES)}")
            allowed = (RULES[name].default, *RULES[name].other)
            if said.action is not None and said.action not in allowed:
                raise fault(
                    f"rules.{name}.action", f"'{said.action}' is not one of {', '.join(allowed)}"
                )
        return self

    @property
    def actions(self) -> dict[str, Action]:
        """What is done under each rule."""
        return actions({name: c.action for name, c in self.rules.items() if c.action is not None})

    @property
    def limits(self) -> dict[str, float]:
        """The largest share of rows a rule may be met in, where there is a limit."""
        return {name: c.at_most for name, c in self.rules.items() if c.at_most is not None}

    @property
    def policies(self) -> list[str]:
        """What there are rewards and a report of: objectives round by round, then audits."""
        return [*(name for one in self.rounds for name in one), *self.audits]

    @property
    def rounds(self) -> list[list[str]]:
        """The objectives, each after those whose policies it needs."""
        return rounds(self.objectives)

    @property
    def bases(self) -> set[str]:
        """The objectives whose policy is another's reference or start."""
        return bases(self.objectives)

    @property
    def scored_models(self) -> list[str]:
        """Models scored under their own names: all but those that are only audited."""
        audited = {audit.policy for audit in self.audits.values()}
        used = {audit.reference for audit in self.audits.values()}
        for objective in self.objectives.values():
            used |= {objective.reference, objective.start}
        return [name for name in self.models if name in used or name not in audited]

    def reference_of(self, policy: str) -> str:
        """The model, or the objective whose policy it is, that a policy is reported against."""
        if policy in self.objectives:
            return self.objectives[policy].reference
        return self.audits[policy].reference

    def scored_as(self, name: str) -> ModelConfig:
        """How a model or policy is run where it is scored.

        A policy as its reference is, since the two are subtracted; whole rounds so have one
        numerics, that of the model they are all measured against in the end.
        """
        while name not in self.models:
            name = self.reference_of(name)
        return self.models[name]

    def trained_as(self, start: str) -> ModelConfig:
        """How a start is run in training: a policy as it was trained itself."""
        while start not in self.models:
            start = self.objectives[start].start
        return self.models[start]

    @property
    def digest(self) -> str:
        """An id of everything the plan says but its store; paths count as written."""
        said = self.model_dump(mode="json", exclude={"store"})
        return content_id("plan", _as_written(said, self._written))


def _as_written(value: Any, written: Mapping[str, str]) -> Any:
    match value:
        case dict():
            return {key: _as_written(item, written) for key, item in value.items()}
        case list():
            return [_as_written(item, written) for item in value]
        case str():
            return written.get(value, value)
    return value
