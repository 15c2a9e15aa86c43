"""Ranked lists: NeMo's completions, Nectar's answers, and plain lists with the best first.

`ranked`: `prompt`, a text or a list of {role, content}, and a list under `responses`, `completions`
or `answers`: of texts, best first or with a parallel list `ranks`, or of objects that have a `rank`
and a text (`TEXTS`). `nemo`: `context`, a list of {role, content}, and `completions`, a list of
{rank, completion: [one assistant turn]}. The lowest rank is the best, equal ranks are ties.
Every other field survives in `meta`.
"""

from pipeline.sources.base import Read, ReadOptions
from pipeline.sources.fields import Leftovers, finite, listed, prompt, required, rest, score
from pipeline.sources.lists import candidates, first_list, item, parallel, text_field
from pipeline.sources.pairing import pair
from pipeline.sources.transcripts import is_transcript

_LISTS = ("responses", "completions", "answers")


def read_ranked(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is the pairs that `options.pairing` makes of its list.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `lengths_differ`,
            `not_a_transcript`; for single candidates and pairs, see `pair`, they are returned.
    """
    asked = required(row, "prompt")
    place, items = first_list(row, _LISTS)
    left: Leftovers = {}
    head = prompt(asked, "prompt", left)
    ranks = None
    if row.get("ranks") is not None:
        ranks = parallel(row, "ranks", place, len(items))
    objects = bool(items) and isinstance(items[0], dict)

    def read(index: int) -> tuple[object, float, dict[str, object]]:
        said, rank, meta = items[index], float(index), {}
        if objects:
            entry = item(items, index, place)
            field = text_field(entry, f"{place}[{index}]")
            said = entry[field]
            if ranks is None:
                rank = score(entry, "rank")
            meta = rest(entry, (field, "rank") if ranks is None else (field,), {})
        if ranks is not None:
            rank = finite(ranks[index], f"ranks[{index}]")
        return said, -rank, meta

    good, bad = candidates(head, place, len(items), read, strip=is_transcript(asked))
    used = ("prompt", place) if ranks is None else ("prompt", place, "ranks")
    return [*bad, *pair(good, options, rest(row, used, left), ranked=True)]


def read_nemo(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is the pairs that `options.pairing` makes of its completions.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`; for single completions and
            pairs, see `pair`, they are returned.
    """
    left: Leftovers = {}
    head = prompt(required(row, "context"), "context", left)
    items = listed(row, "completions")

    def read(index: int) -> tuple[object, float, dict[str, object]]:
        entry = item(items, index, "completions")
        said = required(entry, "completion")
        return said, -score(entry, "rank"), rest(entry, ("rank", "completion"), {})

    good, bad = candidates(head, "completions", len(items), read)
    meta = rest(row, ("context", "completions"), left)
    return [*bad, *pair(good, options, meta, ranked=True)]
