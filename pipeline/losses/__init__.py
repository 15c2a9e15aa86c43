"""The preference losses, by name.

A registry entry says what a loss is and what it needs, so that the plan, the trainer and the
reward table ask it instead of knowing. Formulas are of tensors: of a training batch, or of a
table's columns. torch is imported inside the functions only: a plan can be checked, and a Dagster
code location loaded, without it.
"""

from pipeline.losses.base import (
    NEEDS,
    LossInputError,
    LossSpec,
    Need,
    PairBatch,
    Parameter,
    Statistics,
    Target,
    Values,
)
from pipeline.losses.batchwise import AOT, AOT_UNPAIRED, BETA_DPO
from pipeline.losses.dpo import CDPO, DPO, DPO_NORM, DPOP, ODPO, RDPO, ROBUST
from pipeline.losses.ipo import IPO, IPO_MEAN, LECTURE_IPO, SPPO_HARD
from pipeline.losses.kto import (
    APO_DOWN,
    APO_ZERO,
    BCO_PAIR,
    BCO_PAIR_UNSHIFTED,
    BCO_UNPAIRED,
    KTO,
    LECTURE_KTO,
    NCA_PAIR,
)
from pipeline.losses.margin import (
    DISCOPOP,
    EXO_PAIR,
    FDPO_ALPHA,
    FDPO_FORWARD_KL,
    FDPO_JS,
    HINGE,
    RPO_BWD_KL,
    RPO_FWD_KL,
    RPO_SQ,
)
from pipeline.losses.simpo import (
    ALPHAPO,
    CPO,
    NLL_MEAN,
    NLL_SUM,
    NLL_TOKEN_MEAN,
    ORPO,
    SIMPO,
    SIMPO_RATIO,
    SLIC,
    TPO_L,
)
from pipeline.losses.sums import weighted_sum
from pipeline.losses.tokens import LD_DPO, LD_DPO_POLICY, TDPO1, TDPO2, WPO

_LOGISTIC = (DPO, CDPO, ROBUST, DPO_NORM, RDPO, DPOP, ODPO, BETA_DPO, AOT, AOT_UNPAIRED)
_SQUARED = (IPO, IPO_MEAN, LECTURE_IPO, SPPO_HARD)
_MARGIN = (HINGE, EXO_PAIR, DISCOPOP, RPO_SQ, RPO_BWD_KL, RPO_FWD_KL)
_DIVERGENCES = (FDPO_FORWARD_KL, FDPO_ALPHA, FDPO_JS)
_SIDES = (KTO, LECTURE_KTO, APO_ZERO, APO_DOWN, NCA_PAIR)
_BCO = (BCO_PAIR, BCO_UNPAIRED, BCO_PAIR_UNSHIFTED)
_NO_REFERENCE = (SIMPO, SIMPO_RATIO, CPO, SLIC, ALPHAPO, ORPO, TPO_L)
_NLL = (NLL_SUM, NLL_MEAN, NLL_TOKEN_MEAN)
_TOKENS = (LD_DPO, LD_DPO_POLICY, WPO, TDPO1, TDPO2)

REGISTRY: dict[str, LossSpec] = {
    spec.name: spec
    for family in (
        *(_LOGISTIC, _SQUARED, _MARGIN, _DIVERGENCES, _SIDES),
        *(_BCO, _NO_REFERENCE, _NLL, _TOKENS),
    )
    for spec in family
}

OF_ROWS = tuple(name for name, spec in REGISTRY.items() if spec.rows is not None)
"""The losses that labels can train: each reply has a loss of its own, whatever its rival's is."""

NOT_YET = {
    "humanline": "clamps each token's log-ratio before the sum (HALOs): needs token lists of both "
    "models",
    "TR-DPO": "moves the reference while training, so that no cached log-prob stays true",
}
"""What of the family is not here, and why."""

__all__ = [
    "NEEDS",
    "NOT_YET",
    "OF_ROWS",
    "REGISTRY",
    "LossInputError",
    "LossSpec",
    "Need",
    "PairBatch",
    "Parameter",
    "Statistics",
    "Target",
    "Values",
    "weighted_sum",
]
