"""The loss landscape: fixed policies as every loss sees them."""

import pandera.polars as pa

from schemas.base import ID, Table

_QUANTILE = "Of the pairs' gradient weights, nearest rank."


class LossLandscape(Table):
    """One row is a loss with one setting, asked of one policy as it is; nothing is retrained.

    A pair's gradient weight is |dLoss/dscore| in the loss's own scale, the mean of its two replies,
    so weights compare within a loss and shares between losses.
    """

    policy: str
    policy_id: str = pa.Field(str_matches=ID)
    rewards_digest: str = pa.Field(description="The snapshot of `rewards` this was computed over.")
    loss: str
    values: str = pa.Field(description="Every parameter of the loss, as name=value.")
    beta: float | None = pa.Field(nullable=True)
    gamma: float | None = pa.Field(nullable=True)
    tau: float | None = pa.Field(nullable=True)
    label_smoothing: float | None = pa.Field(nullable=True)
    n_pairs: int = pa.Field(ge=1)
    mean_loss: float
    weight_mean: float = pa.Field(ge=0)
    weight_p05: float = pa.Field(ge=0, description=_QUANTILE)
    weight_p25: float = pa.Field(ge=0, description=_QUANTILE)
    weight_p50: float = pa.Field(ge=0, description=_QUANTILE)
    weight_p75: float = pa.Field(ge=0, description=_QUANTILE)
    weight_p95: float = pa.Field(ge=0, description=_QUANTILE)
    weight_max: float = pa.Field(ge=0)
    effective_pairs: float = pa.Field(
        ge=0, description="(sum of weights)² / sum of squared weights (Kish 1965)."
    )
    effective_share: float = pa.Field(ge=0, le=1.000001, description="Of the pairs.")
    saturated_share: float = pa.Field(
        ge=0,
        le=1,
        description="Pairs whose weight is below 1 % of that of a pair the policy has not moved "
        "on: the loss has let go of them.",
    )
