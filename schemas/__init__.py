"""What one row of each table is: Pandera (Polars) models and dtypes, nothing else."""

from schemas.base import MESSAGES, SPANS, TOKEN_IDS, Table, polars_schema, require_validation
from schemas.intake import (
    Confound,
    InputRow,
    LabelCandidate,
    PairCandidate,
    PreferenceLabel,
    PreferencePair,
    QuarantinedRow,
    RuleCount,
    UnitCandidate,
)
from schemas.landscape import LossLandscape
from schemas.rewards import AlignedReward, Reward
from schemas.scoring import (
    LogProb,
    Scorer,
    SequenceExtra,
    TokenExtra,
    TokenLogProb,
    UnscoredSequence,
    identity_fields,
)
from schemas.sequences import (
    KlSequence,
    LabelSequence,
    PairSequence,
    Sequence,
    Tokenization,
    UntokenizedLabel,
    UntokenizedPair,
)
from schemas.training import TrainedExample, TrainingEvaluation, TrainingStep

__all__ = [
    "MESSAGES",
    "SPANS",
    "TOKEN_IDS",
    "AlignedReward",
    "Confound",
    "InputRow",
    "KlSequence",
    "LabelCandidate",
    "LabelSequence",
    "LogProb",
    "LossLandscape",
    "PairCandidate",
    "PairSequence",
    "PreferenceLabel",
    "PreferencePair",
    "QuarantinedRow",
    "Reward",
    "RuleCount",
    "Scorer",
    "Sequence",
    "SequenceExtra",
    "Table",
    "TokenExtra",
    "TokenLogProb",
    "Tokenization",
    "TrainedExample",
    "TrainingEvaluation",
    "TrainingStep",
    "UnitCandidate",
    "UnscoredSequence",
    "UntokenizedLabel",
    "UntokenizedPair",
    "identity_fields",
    "polars_schema",
    "require_validation",
]
