"""HelpSteer's preferences and attributes (arXiv 2311.09528, 2406.08673, 2410.01257, 2505.11475).

Preferences: `prompt`, a text, or `context`, a list of {role, content}; `response_1` and
`response_2`, or `response1` and `response2`; `preference_strength` or `overall_preference`, from
-3, the first response is much better, to 3. Attributes: `prompt`, `response` and one number each
for `helpfulness`, `correctness` and others; the other responses to the prompt are in other rows.
Every other field survives in `meta`.
"""

from pipeline.sources.base import Candidate, Message, Read, ReadOptions, RowError, Unit
from pipeline.sources.fields import Leftovers, required, rest, score, text, turns
from pipeline.sources.pairing import preferred_by
from pipeline.sources.transcripts import steer_turns

_RESPONSES = (("response_1", "response_2"), ("response1", "response2"))
_PREFERENCES = ("preference_strength", "overall_preference")
_SCALE = 3


def read_helpsteer(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one pair, or one candidate with the score `options.score`, else its helpfulness.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `strength_not_finite`,
            `score_out_of_scale`; for a pair, `tied`, `gap_too_small`.
    """
    asked = "prompt" if row.get("context") is None else "context"
    left: Leftovers = {}
    prompt = _prompt(required(row, asked), asked, left)
    for names in _RESPONSES:
        if row.get(names[0]) is not None or row.get(names[1]) is not None:
            return [_pair(row, prompt, names, {asked, *names}, left, options)]
    field = options.score or "helpfulness"
    said, value = text(row, "response"), score(row, field)
    return [Candidate(prompt, said, value, rest(row, (asked, "response", field), left))]


def _prompt(value: object, place: str, left: Leftovers) -> list[Message]:
    return steer_turns(value) if isinstance(value, str) else turns(value, place, left)


def _pair(
    row: dict[str, object],
    prompt: list[Message],
    names: tuple[str, str],
    used: set[str],
    left: Leftovers,
    options: ReadOptions,
) -> Unit:
    first, second = text(row, names[0]), text(row, names[1])
    field = next((name for name in _PREFERENCES if row.get(name) is not None), _PREFERENCES[0])
    preference = score(row, field)
    if abs(preference) > _SCALE:
        raise RowError("score_out_of_scale", f"'{field}' is {preference:g}, not from -3 to 3")
    strength = preferred_by(abs(preference), options.min_gap, (1, 2))
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    return Unit(prompt, chosen, rejected, strength, None, rest(row, used | {field}, left))
