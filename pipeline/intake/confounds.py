"""What one feature of a reply's text alone says about which reply was chosen."""

from collections import Counter
from collections.abc import Mapping

import polars as pl

from schemas import Confound, polars_schema

_REFUSAL = (
    r"(?i)\b(i('m| am) sorry|i apologi[sz]e|i can(no|')t (help|assist|do|provide|comply)|as an ai|"
    r"i('m| am) (not able|unable) to)\b"
)
_REFUSAL_WITHIN = 200


def _features(reply: str) -> dict[str, pl.Expr]:
    text = pl.col(reply)
    return {
        "characters": text.str.len_chars(),
        "lines": text.str.count_matches("\n", literal=True),
        "list_items": text.str.count_matches(r"(?m)^\s*([-*•]|\d+[.)])\s"),
        "markdown": text.str.count_matches(r"(?m)^#{1,6}\s|\*\*|```"),
        "digits": text.str.count_matches(r"[0-9]"),
        "question_marks": text.str.count_matches("?", literal=True),
        "exclamation_marks": text.str.count_matches("!", literal=True),
        "refusal": text.str.slice(0, _REFUSAL_WITHIN).str.contains(_REFUSAL).cast(pl.UInt32),
    }


def count_confounds(pairs: pl.DataFrame) -> Counter[tuple[str, str]]:
    """For each feature, in how many pairs chosen has more of it and in how many rejected has.

    Keys are (feature, `chosen` or `rejected`), and (`pairs`, `n`). Counts of parts add up.
    """
    chosen, rejected = _features("chosen"), _features("rejected")
    more = pairs.select(**{name: (chosen[name] > rejected[name]).sum() for name in chosen})
    less = pairs.select(**{name: (chosen[name] < rejected[name]).sum() for name in chosen})
    counted = Counter({("pairs", "n"): pairs.height})
    for side, found in (("chosen", more), ("rejected", less)):
        counted.update({(name, side): n for name, n in found.row(0, named=True).items()})
    return counted


def confound_table(counted: Mapping[tuple[str, str], int]) -> pl.DataFrame:
    """Counts of all pairs as `schemas.Confound`."""
    n = counted.get(("pairs", "n"), 0)
    rows = []
    for name in _features("chosen"):
        more, less = counted.get((name, "chosen"), 0), counted.get((name, "rejected"), 0)
        auc = 0.5 + (more - less) / (2 * n) if n else 0.5
        rows.append(
            {
                "feature": name,
                "n": n,
                "chosen_has_more": more,
                "rejected_has_more": less,
                "auc": auc,
            }
        )
    return pl.DataFrame(rows, schema=polars_schema(Confound))
