"""Scored candidates, and UltraFeedback with its several completions (arXiv 2310.01377).

`scored`: `prompt`, a text or a list of {role, content}, and a list under `candidates`, `responses`
or `completions`: of objects that have a text (`TEXTS`) and a `score`, or of texts with a parallel
list `scores`. `ultrafeedback`: `instruction`, and `completions`, objects with `response`,
`overall_score` and `fine-grained_score`. `options.score` names another score field (or parallel
list). Every other field survives in `meta`.
"""

from pipeline.sources.base import Read, ReadOptions, RowError
from pipeline.sources.fields import (
    Leftovers,
    finite,
    listed,
    prompt,
    required,
    rest,
    score,
    text,
)
from pipeline.sources.lists import candidates, first_list, item, parallel, text_field
from pipeline.sources.pairing import pair
from pipeline.sources.transcripts import is_transcript

_LISTS = ("candidates", "responses", "completions")
_OVERALL, _FINE = "overall_score", "fine-grained_score"
_TOP, _LOW = 10, 2
"""OpenBMB's own correction of UltraFeedback gave a 1 to completions with an overall score of 10 and
a mean of the fine-grained ones, which go from 1 to 5, up to 2; files from before it have the 10."""


def read_scored(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is the pairs that `options.pairing` makes of its candidates.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `lengths_differ`,
            `not_a_transcript`; for single candidates and pairs, see `pair`, they are returned.
    """
    asked = required(row, "prompt")
    place, items = first_list(row, _LISTS)
    left: Leftovers = {}
    head = prompt(asked, "prompt", left)
    objects = bool(items) and isinstance(items[0], dict)
    field = options.score or ("score" if objects else "scores")
    scores = [] if objects else parallel(row, field, place, len(items))

    def read(index: int) -> tuple[object, float, dict[str, object]]:
        if not objects:
            return items[index], finite(scores[index], f"{field}[{index}]"), {}
        entry = item(items, index, place)
        said = text_field(entry, f"{place}[{index}]")
        return entry[said], score(entry, field), rest(entry, (said, field), {})

    good, bad = candidates(head, place, len(items), read, strip=is_transcript(asked))
    used = ("prompt", place) if objects else ("prompt", place, field)
    return [*bad, *pair(good, options, rest(row, used, left))]


def read_ultrafeedback(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is the pairs that `options.pairing` makes of its completions.

    A completion with an overall score of 10 that the fine-grained ones contradict is an error.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`; for single completions
            (`score_contradicts_label` among them) and pairs, see `pair`, they are returned.
    """
    head = prompt(text(row, "instruction"), "instruction", {})
    items = listed(row, "completions")
    field = options.score or _OVERALL

    def read(index: int) -> tuple[object, float, dict[str, object]]:
        entry = item(items, index, "completions")
        said, value = text(entry, "response"), score(entry, field)
        fine = entry.get(_FINE)
        if field == _OVERALL and value == _TOP and isinstance(fine, int | float) and fine <= _LOW:
            raise RowError(
                "score_contradicts_label",
                f"completions[{index}] has an overall score of 10 and a fine-grained one of {fine}",
            )
        return said, value, rest(entry, ("response", field), {})

    good, bad = candidates(head, "completions", len(items), read)
    return [*bad, *pair(good, options, rest(row, ("instruction", "completions"), {}))]
