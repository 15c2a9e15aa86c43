"""How much the desirable replies of a training weigh against the undesirable ones.

A loss of rows has a weight for either class (KTO's lambda_D and lambda_U). With n_D and n_U rows of
the two, the KTO paper asks for lambda_D n_D / (lambda_U n_U) between 1 and 3/2 (arXiv 2402.01306,
section 4.2; between 1 and 4/3 in its first version, which TRL warns by).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.training.data.examples import Example

LEAST, MOST = 1.0, 1.5
"""The paper's bounds of the ratio."""


@dataclass(frozen=True)
class ClassBalance:
    """The rows of either class and the weights in force; a pair is a row of each.

    Attributes:
        n_desirable: chosen replies and desirable labels.
        n_undesirable: the others.
        share_desirable: of them, each counted by its example's weight.
        share_undesirable: of the others.
        desirable_weight: the loss's; 1 for a loss that has none.
        undesirable_weight: the loss's.
        bounded: whether the paper's bounds are about this loss: it has a weight for both classes.
    """

    n_desirable: int
    n_undesirable: int
    share_desirable: float
    share_undesirable: float
    desirable_weight: float
    undesirable_weight: float
    bounded: bool

    @property
    def ratio(self) -> float | None:
        """lambda_D n_D / (lambda_U n_U); None without undesirable rows."""
        if not self.n_undesirable:
            return None
        weighed = self.desirable_weight * self.share_desirable
        return weighed / (self.undesirable_weight * self.share_undesirable)

    @property
    def advice(self) -> str | None:
        """What to set, where the ratio is outside the paper's bounds; else None."""
        if not self.n_desirable or not self.n_undesirable:
            only = "undesirable" if self.n_undesirable else "desirable"
            return f"all {self.n_desirable + self.n_undesirable} rows it trains on are {only}"
        ratio = self.ratio
        assert ratio is not None
        if not self.bounded or LEAST - _ROUNDING <= ratio <= MOST + _ROUNDING:
            return None
        low, high = (bound / ratio * self.desirable_weight for bound in (LEAST, MOST))
        other_low, other_high = (ratio / b * self.undesirable_weight for b in (MOST, LEAST))
        return (
            f"{self.n_desirable} desirable and {self.n_undesirable} undesirable rows, with weights "
            f"{self.desirable_weight:g} and {self.undesirable_weight:g}, weigh {ratio:.3g} to 1; "
            f"KTO's paper asks for {LEAST:g} to {MOST:g}, so for a desirable_weight from {low:.3g} "
            f"to {high:.3g}, or an undesirable_weight from {other_low:.3g} to {other_high:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


def class_balance(examples: Iterable[Example], values: Mapping[str, float]) -> ClassBalance | None:
    """How the rows of examples balance under a loss's weights.

    Args:
        examples: what is trained on.
        values: the loss's parameters.

    Returns:
        None for a loss without a weight for a class.
    """
    if "undesirable_weight" not in values:
        return None
    rows = [(side == "chosen", example.weight) for example in examples for side in example.sides]
    classes = [[weight for liked, weight in rows if liked is of] for of in (True, False)]
    return ClassBalance(
        len(classes[0]),
        len(classes[1]),
        sum(classes[0]),
        sum(classes[1]),
        values.get("desirable_weight", 1.0),
        values["undesirable_weight"],
        "desirable_weight" in values,
    )


_ROUNDING = 1e-9
