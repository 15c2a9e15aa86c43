"""The plan: one YAML file that says what to read, score, train and report."""

from pipeline.plan.audit import write_audit_plan
from pipeline.plan.load import environment_overrides, load_plan
from pipeline.plan.objective import ObjectiveConfig
from pipeline.plan.report import LandscapeConfig, ReportConfig
from pipeline.plan.sections import (
    AuditConfig,
    Extra,
    LoraConfig,
    ModelConfig,
    ParityConfig,
    Plan,
    ScoringConfig,
    SourceConfig,
    SplitConfig,
    TokenizationConfig,
    TrainingConfig,
    VllmConfig,
)
from pipeline.plan.selection import Selection, Sql, policies_named, selection_of

__all__ = [
    "AuditConfig",
    "Extra",
    "LandscapeConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ParityConfig",
    "Plan",
    "ReportConfig",
    "ScoringConfig",
    "Selection",
    "SourceConfig",
    "SplitConfig",
    "Sql",
    "TokenizationConfig",
    "TrainingConfig",
    "VllmConfig",
    "environment_overrides",
    "load_plan",
    "policies_named",
    "selection_of",
    "write_audit_plan",
]
