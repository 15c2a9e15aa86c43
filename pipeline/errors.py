"""Every error a user can cause, by what they must do about it."""


class LogratioError(Exception):
    """Something a user can mend; the message says what and where."""


class PlanError(LogratioError):
    """The plan is wrong: names the file, the key and the allowed values."""


class SourceError(LogratioError):
    """A source cannot be read at all (a missing file, an unknown compression)."""


class StoreError(LogratioError):
    """A table is missing, damaged or cannot be written; names the path."""


class ModelError(LogratioError):
    """A checkpoint, adapter or tokeniser cannot be used; names it and says why."""


class ScoringError(LogratioError):
    """An engine returned what cannot be a log-prob, or cannot score a row."""


class TrainingError(LogratioError):
    """Training cannot start or go on; names the step and the cause."""
