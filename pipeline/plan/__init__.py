"""The plan: one YAML file that says what to read, score, train and report."""

from pipeline.plan.audit import write_audit_plan
from pipeline.plan.load import environment_overrides, load_plan
from pipeline.plan.models import ModelConfig, VllmConfig
from pipeline.plan.objective import ObjectiveConfig
from pipeline.plan.report import LandscapeConfig, ReportConfig
from pipeline.plan.scoring import Extra, ParityConfig, ScoringConfig
from pipeline.plan.sections import (
    AuditConfig,
    Plan,
    SourceConfig,
    SplitConfig,
    TokenizationConfig,
)
from pipeline.plan.selection import Selection, Sql, policies_named, selection_of
from pipeline.plan.training import LoraConfig, TrainingConfig

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
