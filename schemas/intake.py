"""Tables of the intake: what happened to each input row, the valid pairs, the rejected rows."""

from typing import Annotated

import pandera.polars as pa
import polars as pl
from pandera.api.polars.types import PolarsData

from schemas.base import ID, MESSAGES, Table

DISPOSITIONS = ["accepted", "merged", "quarantined"]
SPLITS = ["train", "test", "evaluation", "left_out"]
ROLES = ["system", "user", "assistant"]


class InputRow(Table):
    """One row is the fate of one input row: nothing that was read is lost."""

    source: str = pa.Field(description="Name of the source in the plan.")
    file: str = pa.Field(description="File the row stands in, as the plan names it.")
    row: int = pa.Field(ge=0, description="Row number in the file, from 0.")
    byte_offset: int | None = pa.Field(
        nullable=True,
        ge=0,
        description="Where the row begins in the uncompressed file, in bytes; null for formats "
        "whose rows have no bytes of their own (Parquet, Arrow).",
    )
    disposition: str = pa.Field(
        isin=DISPOSITIONS,
        description="accepted; merged (the same pair was read before); quarantined.",
    )
    n_units: int = pa.Field(
        ge=0,
        description="Preference pairs and labels read from the row. A pair of two rows (rivals "
        "under one prompt) is counted at its chosen one.",
    )
    pair_id: str | None = pa.Field(
        nullable=True, str_matches=ID, description="The pair the row became or was merged into."
    )
    label_id: str | None = pa.Field(nullable=True, str_matches=ID, description="Or the label.")
    duplicate_of: str | None = pa.Field(
        nullable=True, str_matches=ID, description="For a merged row, the pair or label it repeats."
    )


class QuarantinedRow(Table):
    """One row is an input row (or one unit of it) that was rejected, and why."""

    source: str
    file: str
    row: int = pa.Field(ge=0)
    unit: int = pa.Field(ge=0, description="Which unit of the row, from 0.")
    byte_offset: int | None = pa.Field(nullable=True, ge=0)
    rule: str = pa.Field(description="The first rule that was broken.")
    rule_version: int = pa.Field(ge=1)
    detail: str = pa.Field(description="What exactly was wrong.")
    raw: str = pa.Field(description="The beginning of the row as it was read.")


class PreferencePair(Table):
    """One row is a distinct valid preference pair; `chosen` was preferred to `rejected`."""

    pair_id: str = pa.Field(unique=True, str_matches=ID)
    prompt_id: str = pa.Field(str_matches=ID)
    sources: Annotated[pl.List, pl.String] = pa.Field(
        description="Every source the pair was read from."
    )
    split: str = pa.Field(isin=SPLITS, description="Decided by the prompt's id alone.")
    prompt: MESSAGES = pa.Field(description="The messages before the two replies.")  # type: ignore[valid-type]
    chosen: str
    rejected: str
    strength: float | None = pa.Field(
        nullable=True, description="How strongly chosen is preferred, as the source scales it."
    )
    votes: int = pa.Field(ge=1, description="How many input units gave this very pair.")
    flags: Annotated[pl.List, pl.String] = pa.Field(description="What is unusual but allowed.")
    meta: str = pa.Field(description="The row's other columns, as JSON.")
    file: str = pa.Field(description="File of the first row that gave the pair.")
    row: int = pa.Field(ge=0, description="Number of that row, from 0.")
    byte_offset: int | None = pa.Field(
        nullable=True, ge=0, description="Where that row begins, in bytes."
    )


class PreferenceLabel(Table):
    """One row is a distinct labelled completion (KTO-style data)."""

    label_id: str = pa.Field(unique=True, str_matches=ID)
    prompt_id: str = pa.Field(str_matches=ID)
    sources: Annotated[pl.List, pl.String]
    split: str = pa.Field(isin=SPLITS, description="Decided by the prompt's id alone.")
    prompt: MESSAGES  # type: ignore[valid-type]
    completion: str
    desirable: bool
    votes: int = pa.Field(ge=1, description="How many input units gave this very label.")
    flags: Annotated[pl.List, pl.String]
    meta: str = pa.Field(description="The row's other columns, as JSON.")
    file: str
    row: int = pa.Field(ge=0)
    byte_offset: int | None = pa.Field(nullable=True, ge=0)


class RuleCount(Table):
    """One row is a rule in one run of the intake: how often it was met, and what was done."""

    rule: str = pa.Field(unique=True)
    version: int = pa.Field(ge=1)
    action: str
    n: int = pa.Field(ge=0, description="Rows (or units of rows) it was met in.")
    share: float = pa.Field(ge=0, description="`n` over the rows read.")
    at_most: float | None = pa.Field(nullable=True, description="The plan's limit of the share.")
    holds: bool = pa.Field(description="The share is within its limit.")


class Confound(Table):
    """One row is a feature of a reply's text, and how far it alone tells chosen from rejected."""

    feature: str = pa.Field(unique=True)
    n: int = pa.Field(ge=0, description="Pairs.")
    chosen_has_more: int = pa.Field(ge=0)
    rejected_has_more: int = pa.Field(ge=0)
    auc: float = pa.Field(
        ge=0, le=1, description="Share of pairs whose chosen reply has more of it, ties half."
    )


class UnitCandidate(pa.DataFrameModel):
    """What every unit as read must keep, before it is accepted.

    Each check's `error` is the rule's name; a unit that breaks it goes to the quarantine under it.
    """

    prompt: MESSAGES  # type: ignore[valid-type]

    @pa.dataframe_check(error="empty_prompt", n_failure_cases=0)
    def prompt_is_not_empty(cls, data: PolarsData) -> pl.LazyFrame:
        """A pair answers at least one message."""
        return data.lazyframe.select(pl.col("prompt").list.len() > 0)

    @pa.dataframe_check(error="unknown_role", n_failure_cases=0)
    def roles_are_known(cls, data: PolarsData) -> pl.LazyFrame:
        """Roles are those a chat template knows."""
        role = pl.element().struct.field("role")
        return data.lazyframe.select(pl.col("prompt").list.eval(role.is_in(ROLES)).list.all())


class LabelCandidate(UnitCandidate):
    """The contract of a labelled completion."""

    completion: str
    desirable: bool

    @pa.dataframe_check(error="empty_reply", n_failure_cases=0)
    def completion_is_not_empty(cls, data: PolarsData) -> pl.LazyFrame:
        """The completion says something."""
        return data.lazyframe.select(pl.col("completion").str.strip_chars() != "")


class PairCandidate(UnitCandidate):
    """The contract of a pair."""

    chosen: str
    rejected: str
    strength: float | None = pa.Field(nullable=True)
    chosen_score: float | None = pa.Field(nullable=True)
    rejected_score: float | None = pa.Field(nullable=True)

    @pa.dataframe_check(error="empty_reply", n_failure_cases=0)
    def replies_are_not_empty(cls, data: PolarsData) -> pl.LazyFrame:
        """Both replies say something."""
        filled = [pl.col(side).str.strip_chars() != "" for side in ("chosen", "rejected")]
        return data.lazyframe.select(filled[0] & filled[1])

    @pa.dataframe_check(error="identical_replies", n_failure_cases=0)
    def replies_differ(cls, data: PolarsData) -> pl.LazyFrame:
        """A pair of equal replies states no preference (margin 0, no gradient).

        Compared after Unicode normalisation (NFC) and with runs of white space as one space.
        """
        sides = [
            pl.col(side).str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()
            for side in ("chosen", "rejected")
        ]
        return data.lazyframe.select(sides[0] != sides[1])

    @pa.dataframe_check(error="strength_not_finite", n_failure_cases=0)
    def strength_is_finite(cls, data: PolarsData) -> pl.LazyFrame:
        """A strength, where given, is a number."""
        return data.lazyframe.select(
            pl.col("strength").is_null() | pl.col("strength").is_finite().fill_null(value=True)
        )

    @pa.dataframe_check(error="score_contradicts_label", n_failure_cases=0)
    def scores_agree_with_the_label(cls, data: PolarsData) -> pl.LazyFrame:
        """The source, where it scores both replies, does not score rejected higher."""
        agree = pl.col("chosen_score") >= pl.col("rejected_score")
        return data.lazyframe.select(agree.fill_null(value=True))
