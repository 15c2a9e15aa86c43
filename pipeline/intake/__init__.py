"""The intake: from sources to the tables `pairs`, `rows` and `quarantine`."""

from pipeline.intake.run import RAW_CAP, IntakeResult, run_intake, sources_digest

__all__ = ["RAW_CAP", "IntakeResult", "run_intake", "sources_digest"]
