"""Text and numbers as a page shows them: nothing invisible, nothing endless."""

import math
import re
from typing import Any

TEXT_LIMIT = 1200
LABEL_LIMIT = 160

# What could reorder, hide or break the text around it: C0 but tab and newline, DEL, C1, line and
# paragraph separators, bidi marks, embeddings, overrides and isolates, invisible operators, the
# byte-order mark, interlinear annotations, tag characters, non-characters and lone surrogates.
# Zero-width joiners stay: emoji and several scripts need them.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with control and bidi characters as visible escapes, such as `[U+202E]`."""
    return _HARMFUL.sub(lambda match: f"[U+{ord(match.group()):04X}]", text)


def label(text: object) -> str:
    """A short text (a name, a rule): visible, and cut with an ellipsis."""
    shown = visible(str(text)[: LABEL_LIMIT + 1])
    return shown if len(shown) <= LABEL_LIMIT else shown[:LABEL_LIMIT] + "…"


def passage(text: str, *, keep_end: bool = False, limit: int = TEXT_LIMIT) -> dict[str, Any]:
    """A long text cut to `limit` characters, with the note the page prints about the cut.

    Returns:
        `text`, and `note`: empty when the text is whole.
    """
    cut = text[-limit:] if keep_end else text[:limit]
    shown = visible(cut)
    shown = shown[-limit:] if keep_end else shown[:limit]
    if len(text) <= limit and len(shown) == len(visible(text)):
        return {"text": shown, "note": ""}
    end = "Last" if keep_end else "First"
    return {"text": shown, "note": f"{end} {limit:,} of {len(text):,} characters shown."}


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A number with a true minus sign and grouped thousands; an en dash for None."""
    if value is None:
        return "–"
    if value and abs(value) < 0.5 * 10**-digits:
        text = f"{value:{'+' if sign else ''}.1e}"
    else:
        # Rounding must not leave a signed zero.
        text = f"{value:{'+' if sign and value else ''},.{digits}f}"
    return text.replace("-", "−")


def significant(value: float | None, digits: int = 2) -> str:
    """A number to so many significant digits, 0.00021 rather than 0.0002; an en dash for None."""
    if value is None:
        return "–"
    if value and 1e-7 <= abs(value) < 1:
        text = f"{value:.{digits - 1 - math.floor(math.log10(abs(value)))}f}".rstrip("0")
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−")


def sentence_case(text: str) -> str:
    """The text with its first letter large and the rest as it was."""
    return text[:1].upper() + text[1:]


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; an en dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def count(value: int | None) -> str:
    """A count with grouped thousands; an en dash for None."""
    return "–" if value is None else f"{value:,}"
