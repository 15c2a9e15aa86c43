"""What a plan may say of its reports."""

from pydantic import BaseModel, Field, field_validator, model_validator

from pipeline.losses import REGISTRY
from pipeline.plan.faults import SECTION, fault


class _Section(BaseModel):
    model_config = SECTION


class LandscapeConfig(_Section):
    """What `loss_landscape` asks of every policy as it is: losses, and values of their parameters.

    A loss takes the lists of the parameters it has, each combination once.
    """

    losses: list[str] | None = Field(
        default=None, description="null: every loss that the tables carry the numbers for."
    )
    beta: list[float] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    gamma: list[float] = []
    tau: list[float] = []
    label_smoothing: list[float] = []

    @field_validator("losses")
    @classmethod
    def _losses_are_known(cls, losses: list[str] | None) -> list[str] | None:
        for loss in losses or ():
            if loss not in REGISTRY:
                raise ValueError(f"'{loss}' is not one of {', '.join(REGISTRY)}")
        return losses

    @model_validator(mode="after")
    def _values_are_in_bounds(self) -> "LandscapeConfig":
        for loss in self.losses or REGISTRY:
            for parameter, bounds in REGISTRY[loss].parameters.items():
                for value in self.grid.get(parameter, ()):
                    if not bounds.allows(value):
                        raise fault(parameter, f"{value} is outside {loss}'s bounds: {bounds}")
        return self

    @property
    def grid(self) -> dict[str, list[float]]:
        """Values by parameter, where there are any."""
        lists = {name: getattr(self, name) for name in ("beta", "gamma", "tau", "label_smoothing")}
        return {name: values for name, values in lists.items() if values}


class ReportConfig(_Section):
    """What the report applies to every policy alike."""

    beta: float = Field(default=0.1, gt=0)
    landscape: LandscapeConfig = LandscapeConfig()
