"""Rules over one unit at a time: the contract (Pandera) and what is unusual but allowed."""

from collections.abc import Mapping

import ftfy.badness
import pandera.errors
import polars as pl
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from pipeline.intake.rows.units import LABEL, PAIR
from pipeline.rules import Action
from schemas import LabelCandidate, PairCandidate, UnitCandidate, polars_schema, require_validation

NEAR_IDENTICAL = 0.95
"""Normalised edit similarity above which two replies are nearly one."""

REJECTED_SCHEMA = pl.Schema(
    {"ordinal": pl.UInt64(), "unit": pl.UInt32(), "rule": pl.String(), "detail": pl.String()}
)
"""A unit that was not accepted, and the first rule it broke."""

_ODD = (
    r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x9F\x{FFFD}\x{200B}\x{202A}-\x{202E}\x{2060}-\x{2069}"
    r"\x{FEFF}]"
)
_NOT_ASCII = r"[^\x00-\x7F]"


def apply_contract(
    units: pl.DataFrame, acts: Mapping[str, Action]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split pairs and labels into those kept, with their `flags`, and `REJECTED_SCHEMA` rows.

    `detail` names every rule that was broken, `rule` the first of them. Candidates have no
    contract yet: the pairs made of them have.

    Raises:
        pandera.errors.SchemaErrors: a structural fault (a column or dtype), which is our own bug.
    """
    pairs, labels = units.filter(kind=PAIR), units.filter(kind=LABEL)
    parts = [
        _judged(pairs, {**_broken(pairs, PairCandidate), **_unusual(pairs)}, acts),
        _judged(
            labels,
            {
                **_broken(labels.rename({"chosen": "completion"}), LabelCandidate),
                **_unusual(labels),
            },
            acts,
        ),
    ]
    rest = units.filter(~pl.col("kind").is_in([PAIR, LABEL])).with_columns(
        flags=pl.lit([], pl.List(pl.String))
    )
    kept = pl.concat([*(kept for kept, _ in parts), rest]).sort("ordinal", "unit")
    return kept, pl.concat([rejected for _, rejected in parts]).sort("ordinal", "unit")


def _broken(units: pl.DataFrame, contract: type[UnitCandidate]) -> dict[str, pl.Series]:
    """For each rule of the contract that some unit breaks, which units do."""
    require_validation()
    found: dict[str, pl.Series] = {}
    try:
        contract.validate(units.select(list(polars_schema(contract))), lazy=True)
    except pandera.errors.SchemaErrors as errors:
        for error in errors.schema_errors:
            if error.check_output is None:
                raise
            found[str(error.check.error)] = ~error.check_output["check_output"]
    # What is wrong with the prompt comes first.
    of_prompts = {str(check.error) for check in UnitCandidate.to_schema().checks}
    return dict(sorted(found.items(), key=lambda entry: entry[0] not in of_prompts))


def _unusual(units: pl.DataFrame) -> dict[str, pl.Series]:
    """For each rule about what is unusual but allowed, which units it finds."""
    roles = pl.col("prompt").list.eval(pl.element().struct.field("role"))
    repeated = roles.list.eval((pl.element() == pl.element().shift(1)).fill_null(value=False))
    texts = [
        pl.col("chosen"),
        pl.col("rejected").fill_null(""),
        pl.col("prompt").list.eval(pl.element().struct.field("content")).list.join("\n"),
    ]
    found = units.select(
        role_repeated=repeated.list.any() | (roles.list.last() == "assistant"),
        odd_characters=pl.any_horizontal(text.str.contains(_ODD) for text in texts),
        not_ascii=pl.any_horizontal(text.str.contains(_NOT_ASCII) for text in texts),
        cut_off="cut_off",
    )
    return {
        "near_identical": _near_identical(units),
        "role_repeated": found["role_repeated"],
        "cut_off": found["cut_off"],
        "mojibake": _mojibake(units.select(texts), found["not_ascii"]),
        "odd_characters": found["odd_characters"],
    }


def _near_identical(units: pl.DataFrame) -> pl.Series:
    both = units.select("chosen", pl.col("rejected").fill_null(""))
    similar = process.cpdist(
        both["chosen"].to_list(),
        both["rejected"].to_list(),
        scorer=Levenshtein.normalized_similarity,
        score_cutoff=NEAR_IDENTICAL,
        workers=1,
    )
    return pl.Series(similar > NEAR_IDENTICAL, dtype=pl.Boolean)


def _mojibake(texts: pl.DataFrame, suspected: pl.Series) -> pl.Series:
    """What ftfy finds bad; only text beyond ASCII can be."""
    found = [
        maybe and any(ftfy.badness.is_bad(text) for text in row)
        for row, maybe in zip(texts.iter_rows(), suspected, strict=True)
    ]
    return pl.Series(found, dtype=pl.Boolean)


def _judged(
    units: pl.DataFrame, found: Mapping[str, pl.Series], acts: Mapping[str, Action]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    def names(action: Action) -> pl.Expr:
        named = [pl.when(mask).then(pl.lit(rule)) for rule, mask in found.items()
                 if acts[rule] == action]  # fmt: skip
        if not named:
            return pl.lit([], pl.List(pl.String))
        return pl.concat_list(named).list.drop_nulls()

    marked = units.with_columns(flags=names("flag"), rules=names("quarantine"))
    broken = pl.col("rules").list.len() > 0
    rejected = marked.filter(broken).select(
        "ordinal",
        "unit",
        rule=pl.col("rules").list.first(),
        detail=pl.lit("breaks ") + pl.col("rules").list.join(", "),
    )
    return marked.filter(~broken).drop("rules"), rejected
