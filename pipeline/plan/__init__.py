"""The plan: one YAML file that says what to read, score, train and report."""

from pipeline.plan.load import environment_overrides, load_plan
from pipeline.plan.sections import (
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    Plan,
    ReportConfig,
    ScoringConfig,
    SourceConfig,
    SplitConfig,
    TokenizationConfig,
    TrainingConfig,
)

__all__ = [
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "Plan",
    "ReportConfig",
    "ScoringConfig",
    "SourceConfig",
    "SplitConfig",
    "TokenizationConfig",
    "TrainingConfig",
    "environment_overrides",
    "load_plan",
]
