"""The implicit rewards: what a policy thinks of each pair, against its reference."""

from typing import Annotated

import pandera.polars as pa
import polars as pl

from schemas.base import ID, Table
from schemas.intake import SPLITS


class Reward(Table):
    """One row is a preference pair under one policy.

    The primary quantity is the log-ratio, log pi(y|x) - log pi_ref(y|x), in nats. `reward_*` is
    the report's beta times it, the same beta for every policy; `objective_score_*` is in the scale
    of the policy's own loss, and `gradient_weight` is dLoss/dmargin there (lecture section 6).
    """

    policy_id: str = pa.Field(str_matches=ID)
    policy_model_id: str = pa.Field(str_matches=ID)
    reference_model_id: str = pa.Field(str_matches=ID)
    numerics_id: str = pa.Field(
        str_matches=ID, description="Of the reference; the policy's differs in `adapter_mode` only."
    )
    pairs_digest: str = pa.Field(description="The snapshot of `pairs` this was computed over.")
    pair_id: str = pa.Field(unique=True, str_matches=ID)
    prompt_id: str = pa.Field(str_matches=ID)
    split: str = pa.Field(isin=SPLITS)
    sources: Annotated[pl.List, pl.String]
    n_chosen: int = pa.Field(ge=1, description="Scored tokens.")
    n_rejected: int = pa.Field(ge=1)
    ref_chosen: float = pa.Field(description="Reference log-prob, nats.")
    ref_rejected: float
    policy_chosen: float = pa.Field(description="Policy log-prob, nats.")
    policy_rejected: float
    logratio_chosen: float = pa.Field(description="Policy minus reference, nats.")
    logratio_rejected: float
    beta: float = pa.Field(gt=0, description="The report's beta.")
    reward_chosen: float = pa.Field(description="beta x log-ratio.")
    reward_rejected: float
    objective_score_chosen: float
    objective_score_rejected: float
    margin: float = pa.Field(description="reward_chosen - reward_rejected.")
    noise_floor: float = pa.Field(
        ge=0,
        nullable=True,
        description="What `margin` may be off by when the same tokens are scored in other batches, "
        "at worst; null if it was not measured.",
    )
    correct: float = pa.Field(isin=[0.0, 0.5, 1.0], description="1, or 0.5 for a tie.")
    gradient_weight: float = pa.Field(ge=0)


class AlignedReward(Reward):
    """`Reward` with what WPO (Zhou et al. 2024, arXiv 2406.11827, eq. 2) weighs a reply by.

    Of a policy that was scored with the extra `log_sum_squares`. The exp of an alignment is about 1
    for a reply sampled from the policy, and small for one it would not say.
    """

    alignment_chosen: float = pa.Field(
        description="Mean over scored tokens of log p(token) - log sum_v p(v)^2 under the policy, "
        "nats per token."
    )
    alignment_rejected: float
