"""The stages of a plan, each from published tables to published tables.

`intake.run_intake` comes first; then `tokenize`, `score` for every model, `train` and `score` for
every objective, `score` for every audit, `compute_rewards` and `write_report` for both; in the
order of `Plan.policies`, where an objective comes after those whose policies it needs. Every stage
can run again: what is there already is not computed twice.
"""

from pipeline.stages.policies import LandscapeResult, compute_landscape, compute_rewards, train
from pipeline.stages.reports import ReportResult, n_reported, write_report
from pipeline.stages.scoring import ScoredRows, score, scored_rows
from pipeline.stages.tokenizing import TokenizeResult, tokenize

__all__ = [
    "LandscapeResult",
    "ReportResult",
    "ScoredRows",
    "TokenizeResult",
    "compute_landscape",
    "compute_rewards",
    "n_reported",
    "score",
    "scored_rows",
    "tokenize",
    "train",
    "write_report",
]
