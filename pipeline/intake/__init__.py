"""The intake: from sources to `pairs`, `labels`, `rows`, `quarantine` and `rule_counts`."""

from pipeline.intake.rows.reading import RAW_CAP
from pipeline.intake.run import IntakeResult, run_intake
from pipeline.intake.sources import sources_digest

__all__ = ["RAW_CAP", "IntakeResult", "run_intake", "sources_digest"]
