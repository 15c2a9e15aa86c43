"""What a plan may say of an objective; its loss's parameters come from the registry."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from pipeline import losses
from pipeline.losses.base import Parameter
from pipeline.losses.sums import WEIGHT
from pipeline.plan.faults import Name, fault

_NOT_VALUES = ("loss", "data", "kl_partner", "reference", "start", "where", "weight")


class ObjectiveConfig(BaseModel):
    """A loss with its values, the reference it is measured against and the model it starts from.

    `loss` is a name, or a weighted sum: a map of names to weights, `{dpo: 0.8, nll_mean: 0.2}`.
    The loss's parameters stand beside it (`beta: 0.1`), for every term that has them; a term's own
    stand with its weight, `{simpo: {weight: 0.2, beta: 2.0}}`. Those a plan leaves out are the
    loss's own defaults (`pipeline.losses`); those the loss does not have are refused. A loss
    without a reference is still reported against one: by default, its start.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    loss: str | dict[str, dict[str, float]]
    data: Literal["pairs", "labels", "both"] | None = Field(
        default=None,
        description="What it trains on; null: the pairs, and the labels too where the loss can "
        "read them, as KTO and BCO can.",
    )
    kl_partner: Literal["ring", "batch_rotation"] | None = Field(
        default=None, description="Where KTO's mismatched replies come from."
    )
    reference: Name
    start: Name
    where: str | None = Field(
        default=None, description="Which pairs it is trained on, instead of `training.where`."
    )
    weight: str | None = Field(
        default=None, description="How much each counts, instead of `training.weight`."
    )

    @model_validator(mode="before")
    @classmethod
    def _as_the_loss_has_it(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {key: value for key, value in given.items() if value is not None}
        named = said.get("loss")
        if named is not None and not isinstance(named, str | dict):
            raise fault("loss", f"{named!r} is no loss; it is a name, or a map of names to weights")
        if isinstance(named, dict):
            said = _as_a_sum(said)
            spec = losses.weighted_sum({name: losses.REGISTRY[name] for name in said["loss"]})
        elif named not in losses.REGISTRY:
            return given  # a field's own validator says so
        else:
            spec = losses.REGISTRY[named]
            beside = {key: value for key, value in said.items() if key not in _NOT_VALUES}
            said |= _valued(named, spec.parameters, beside)
        _require_trained(spec)
        if not spec.needs_kl and "kl_partner" in said:
            raise fault("kl_partner", _has_none("kl_partner", spec.name, spec.parameters))
        if spec.rows is None and said.get("data") in ("labels", "both"):
            raise fault(
                "data",
                f"the loss {spec.name} is one of pairs, which labels cannot train; these read "
                f"labels: {', '.join(losses.OF_ROWS)}",
            )
        default: dict[str, Any] = {"kl_partner": "ring"} if spec.needs_kl else {}
        if not spec.needs_reference and "start" in said:
            default["reference"] = said["start"]
        return {**default, **said}

    @field_validator("loss")
    @classmethod
    def _loss_is_known(cls, loss: Any) -> Any:
        if isinstance(loss, str) and loss not in losses.REGISTRY:
            raise ValueError(_unknown(loss))
        return loss

    @property
    def spec(self) -> losses.LossSpec:
        """The loss as the registry has it, or the sum."""
        if isinstance(self.loss, str):
            return losses.REGISTRY[self.loss]
        return losses.weighted_sum({name: losses.REGISTRY[name] for name in self.loss})

    @property
    def reads_pairs(self) -> bool:
        """Whether it trains on pairs, where there are any."""
        return self.data != "labels"

    @property
    def reads_labels(self) -> bool:
        """Whether it trains on labels, where there are any."""
        return self.data != "pairs" and self.spec.rows is not None

    @property
    def kinds(self) -> list[str]:
        """Of `pairs` and `labels` those it reads."""
        read = {"pairs": self.reads_pairs, "labels": self.reads_labels}
        return [kind for kind, reads in read.items() if reads]

    @property
    def values(self) -> dict[str, float]:
        """The loss's parameters by name, a sum's as `<term>.<parameter>`."""
        if isinstance(self.loss, str):
            return {name: getattr(self, name) for name in self.spec.parameters}
        return {
            f"{term}.{name}": value
            for term, values in self.loss.items()
            for name, value in values.items()
        }

    def __str__(self) -> str:
        """For instance `ipo, beta 0.1, target 5 nats`."""
        said = [self.spec.name, *(f"{name} {value:g}" for name, value in self.values.items())]
        if self.data is not None:
            said.append({"both": "pairs and labels"}.get(self.data, f"{self.data} only"))
        if (target := self.spec.target(self.values)) is not None:
            said.append(f"target {target}")
        return ", ".join(said)


def _as_a_sum(said: Mapping[str, Any]) -> dict[str, Any]:
    """A sum with every term's weight and values spelled out, those beside it dealt out to them."""
    terms: dict[Any, Any] = said["loss"]
    if not terms:
        raise fault("loss", "a sum has one term at least")
    for name in terms:
        if name not in losses.REGISTRY:
            raise fault("loss", _unknown(name))
    beside = {key: value for key, value in said.items() if key not in _NOT_VALUES}
    known = {p: bounds for name in terms for p, bounds in losses.REGISTRY[name].parameters.items()}
    spelled = {}
    for key in beside:
        if key not in known:
            raise fault(key, _has_none(key, " + ".join(terms), known))
    for name, term in terms.items():
        parameters = losses.REGISTRY[name].parameters
        own = term if isinstance(term, dict) else {"weight": term}
        for key in own:
            if key not in ("weight", *parameters):
                has = ", ".join(("weight", *parameters))
                raise fault(f"loss.{name}.{key}", f"unknown key; allowed: {has}")
        shared = {key: value for key, value in beside.items() if key in parameters}
        try:
            spelled[name] = _valued(name, {"weight": WEIGHT, **parameters}, {**shared, **own})
        except ValidationError as error:
            wrong = error.errors()[0]
            key = str(wrong["loc"][0])
            where = key if key not in own else f"loss.{name}.{key}"
            message = wrong["msg"].replace("Input should", f"{wrong['input']!r} should")
            raise fault(where, message) from None
    return {**{key: said[key] for key in _NOT_VALUES if key in said}, "loss": spelled}


def _valued(
    loss: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any]
) -> dict[str, float]:
    """Values inside their bounds, defaults filled in.

    Raises:
        pydantic.ValidationError: one is outside, or no number.
    """
    for key in given:
        if key not in parameters:
            raise fault(key, _has_none(key, loss, parameters))
    model = _model_of(loss, tuple(parameters.items()))
    return model.model_validate(dict(given)).model_dump()


@lru_cache
def _model_of(loss: str, parameters: tuple[tuple[str, Parameter], ...]) -> type[BaseModel]:
    fields: dict[str, Any] = {
        name: (
            float,
            Field(default=p.default, gt=p.above, ge=p.least, lt=p.below, le=p.most),
        )
        for name, p in parameters
    }
    return create_model(loss, __config__=ConfigDict(allow_inf_nan=False), **fields)


def _require_trained(spec: losses.LossSpec) -> None:
    for name in spec.needs:
        need = losses.NEEDS[name]
        if not need.trained:
            raise fault(
                "loss",
                f"{spec.name} cannot be trained yet: it needs {need.what}; of a table with "
                f"{', '.join(need.columns)} it can be asked (pipeline.landscape)",
            )


def _has_none(key: str, loss: str, parameters: Mapping[str, Parameter]) -> str:
    has = ", ".join(parameters) or "no parameter"
    if key == "kl_partner" or any(key in spec.parameters for spec in losses.REGISTRY.values()):
        return f"the loss {loss} has none; it has {has}"
    return f"unknown key; allowed: {', '.join(_NOT_VALUES)}, and of the loss {loss}: {has}"


def _unknown(loss: object) -> str:
    return f"'{loss}' is not one of {', '.join(losses.REGISTRY)}"
