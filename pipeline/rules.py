"""The rules over input data: what each finds, what is done about it, and since which version.

The numbers of the pathologies are those of docs/rules.md, which is made from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from schemas import RuleCount, polars_schema

Action = Literal["quarantine", "quarantine_train", "leave_out", "flag", "merge", "fix", "refuse",
                 "inform", "off"]  # fmt: skip
Stage = Literal["read", "contract", "prompt", "tokenise", "report"]

INTAKE: tuple[Stage, ...] = ("read", "contract", "prompt")
"""The stages of the intake."""

ACTIONS: dict[Action, str] = {
    "quarantine": "goes to the quarantine table, is never scored",
    "quarantine_train": "goes to the quarantine where it would be trained on, is flagged elsewhere",
    "leave_out": "is flagged and scored, but is never trained on (split `left_out`)",
    "flag": "is scored, and named in `flags`",
    "merge": "becomes one pair with its votes and sources",
    "fix": "is mended, and counted",
    "refuse": "the run stops and says why",
    "inform": "a number of the report",
    "off": "is not looked for",
}


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: what quarantine rows, flags and counts call it.
        pathology: its number in docs/rules.md.
        stage: where it is looked for: reading a row, the contract of one unit, the pairs of one
            prompt together, tokenisation, or the report.
        default: what is done unless a plan says otherwise.
        other: what a plan may say instead.
        what: what it finds.
        version: raised when the rule would find something else.
    """

    name: str
    pathology: int
    stage: Stage
    default: Action
    what: str
    other: tuple[Action, ...] = ()
    version: int = 1


_FLAG: tuple[Action, ...] = ("off", "quarantine")
_QUARANTINE: tuple[Action, ...] = ("flag", "off")

_RULES = [
    Rule("invalid_utf8", 1, "read", "quarantine", "bytes that are not UTF-8"),
    Rule("invalid_json", 1, "read", "quarantine", "text that is not JSON"),
    Rule("not_an_object", 1, "read", "quarantine", "JSON that is no object"),
    Rule("duplicate_key", 1, "read", "quarantine", "a key twice in one object"),
    Rule("nan_literal", 1, "read", "quarantine", "NaN, Infinity or a number beyond float64"),
    Rule("lone_surrogate", 1, "read", "quarantine", "an escape that is half a surrogate pair"),
    Rule("too_deep", 1, "read", "quarantine", "more than 100 brackets within one another"),
    Rule("row_too_long", 1, "read", "quarantine", "a row of more than 64 MiB"),
    Rule("broken_framing", 1, "read", "quarantine", "what no row could be cut out of"),
    Rule("invalid_csv", 1, "read", "quarantine", "a CSV record that is not as long as its header"),
    Rule("byte_order_mark", 1, "read", "fix", "U+FEFF before the first row of a file"),
    Rule("missing_field", 2, "read", "quarantine", "a field of the shape is not there"),
    Rule("wrong_type", 2, "read", "quarantine", "a field of another type than the shape's"),
    Rule("unsupported_content", 2, "read", "quarantine", "tool calls, images, audio, other parts"),
    Rule("lengths_differ", 2, "read", "quarantine", "parallel lists of different lengths"),
    Rule("strength_not_finite", 2, "read", "quarantine", "a strength or score beyond float64"),
    Rule("empty_reply", 3, "contract", "quarantine", "a reply of white space alone"),
    Rule("empty_prompt", 3, "contract", "quarantine", "no message before the replies"),
    Rule("identical_replies", 4, "contract", "quarantine",
         "equal replies, after NFC and with runs of white space as one"),
    Rule("near_identical", 5, "contract", "flag",
         "replies whose normalised edit similarity is above 0.95", _FLAG),
    Rule("tied", 6, "prompt", "quarantine_train", "the source scores both replies alike",
         ("quarantine", "flag", "off")),
    Rule("gap_too_small", 6, "read", "quarantine", "scores less apart than the source's `min_gap`"),
    Rule("no_rival", 6, "read", "quarantine", "a ranked list, or a prompt, with one candidate"),
    Rule("too_many_rivals", 6, "read", "quarantine", "over 200 candidates under `pairing: all`"),
    Rule("not_paired", 6, "prompt", "quarantine",
         "a candidate that the source's `pairing` uses in no pair"),
    Rule("score_contradicts_label", 7, "contract", "quarantine",
         "the source scores rejected above chosen, or (UltraFeedback) 10 what it rates 2",
         _QUARANTINE),
    Rule("score_out_of_scale", 7, "read", "quarantine",
         "a score outside the shape's scale (HelpSteer: -3 to 3)"),
    Rule("label_noise", 8, "report", "inform", "the pairs of the lowest margins, with texts"),
    Rule("value_conflict", 9, "report", "inform", "accuracy by the rows' own `category`"),
    Rule("duplicate", 10, "prompt", "merge", "a pair or label that was read before"),
    Rule("contradicted", 10, "prompt", "quarantine",
         "the same two replies the other way round, or one completion labelled both ways",
         _QUARANTINE),
    Rule("preference_cycle", 11, "prompt", "flag",
         "a preference that is part of a cycle among the replies of its prompt", _FLAG),
    Rule("near_eval", 12, "prompt", "leave_out",
         "a training prompt near a held-out or evaluation prompt (Jaccard of character 5-grams "
         "at least 0.8, found by MinHash)", ("flag", "quarantine", "off")),
    Rule("contaminated", 13, "prompt", "flag",
         "a training pair that shares 10 words in a row with an evaluation prompt",
         ("leave_out", "quarantine", "off")),
    Rule("length_bias", 14, "report", "inform", "how often the longer reply is chosen"),
    Rule("unknown_role", 15, "contract", "quarantine", "a role not of system, user, assistant"),
    Rule("role_repeated", 15, "contract", "flag", "one role twice in a row", _FLAG),
    Rule("no_reply", 16, "read", "quarantine", "the last turn is not the assistant's"),
    Rule("prompts_differ", 17, "read", "quarantine", "the two sides differ before the reply"),
    Rule("no_prompt", 17, "read", "quarantine", "two texts without a common beginning"),
    Rule("not_a_transcript", 17, "read", "quarantine", "an HH text that begins with no turn"),
    Rule("scored_spans", 18, "tokenise", "inform", "the scored tokens, part of a sequence's id"),
    Rule("boundary_merge", 19, "tokenise", "flag", "encoding in one go would give other ids"),
    Rule("template_not_prefix_stable", 19, "tokenise", "quarantine",
         "the conversation does not begin as its prompt does"),
    Rule("template_failed", 19, "tokenise", "quarantine", "the chat template refuses the pair"),
    Rule("empty_prompt_ids", 19, "tokenise", "quarantine", "the prompt gives no token"),
    Rule("doubled_bos", 20, "tokenise", "refuse", "the template begins with two BOS tokens"),
    Rule("control_tokens", 21, "tokenise", "flag",
         "the tokeniser's control strings inside a text (`tokenization.control_tokens`)"),
    Rule("no_guard_character", 21, "tokenise", "quarantine",
         "no character is left to mark control strings with"),
    Rule("over_long", 22, "tokenise", "quarantine",
         "more than `max_length` tokens (`tokenization.over_long`)"),
    Rule("identical_tokens", 22, "tokenise", "quarantine",
         "equal token ids, after truncation too"),
    Rule("nothing_to_score", 22, "tokenise", "quarantine", "no token of the reply is left"),
    Rule("cut_off", 23, "contract", "flag",
         "a reply whose `finish_reason` is length", _FLAG),
    Rule("mojibake", 24, "contract", "flag", "text decoded by the wrong table (ftfy)", _FLAG),
    Rule("odd_characters", 24, "contract", "flag",
         "U+FFFD, control, zero-width or bidirectional control characters", _FLAG),
    Rule("template_date", 25, "tokenise", "refuse",
         "the template shows today's date and none is pinned"),
    Rule("confounds", 26, "report", "inform",
         "one feature of the text alone against the label (table `confounds`)"),
]  # fmt: skip

RULES: dict[str, Rule] = {rule.name: rule for rule in _RULES}
"""Name to rule, by pathology."""


def actions(said: Mapping[str, Action]) -> dict[str, Action]:
    """What is done under each rule, given what a plan says of some of them."""
    return {name: said.get(name, rule.default) for name, rule in RULES.items()}


def rule_table(
    stages: Sequence[Stage],
    counted: Mapping[str, int],
    n_rows: int,
    acts: Mapping[str, Action],
    limits: Mapping[str, float],
) -> pl.DataFrame:
    """How often every rule of some stages was met, as `schemas.RuleCount`.

    Args:
        stages: whose rules.
        counted: how often a rule was met, where it was.
        n_rows: rows that were looked at, of which `share` is one.
        acts: what was done under each rule.
        limits: the largest share a rule may have, where there is a limit.
    """
    table = []
    for rule in RULES.values():
        if rule.stage in stages:
            n, limit = counted.get(rule.name, 0), limits.get(rule.name)
            share = n / max(1, n_rows)
            table.append(
                {
                    "rule": rule.name,
                    "version": rule.version,
                    "action": acts[rule.name],
                    "n": n,
                    "share": share,
                    "at_most": limit,
                    "holds": limit is None or share <= limit,
                }
            )
    return pl.DataFrame(table, schema=polars_schema(RuleCount))


def rules_page() -> str:
    """docs/rules.md."""
    rows = [
        f"| {rule.pathology} | `{rule.name}` | {rule.what} | {rule.stage} | **{rule.default}**"
        f"{''.join(f', {action}' for action in rule.other)} | {rule.version} |"
        for rule in RULES.values()
    ]
    kinds = [f"- **{name}**: {text}" for name, text in ACTIONS.items()]
    return "\n".join([_HEAD, *rows, "", "What is done:", "", *kinds, "", _FOOT, ""])


_HEAD = """# Rules

Every rule over input data, by the pathology it is about. The default is bold; a plan may say
another of the actions that stand beside it. This page is made from `pipeline/rules.py`.

| | rule | finds | where | action | version |
|---|---|---|---|---|---|"""

_FOOT = """```yaml
rules:
  contradicted: flag                        # another action
  near_identical: {at_most: 0.05}           # more than 5 % of the rows fail a check
  near_eval: {action: quarantine, at_most: 0.01}
```

Counts and shares of every rule are in the tables `rule_counts/intake` (shares over the rows read)
and `rule_counts/tokenise` (over the pairs); the check `rules_stay_within_their_limits` compares
them with `at_most`, and Dagster draws them over time. Rejected rows are in `quarantine` with file,
row, byte offset, the rule and its version; pairs that tokenisation cannot carry are in
`untokenized_pairs`."""
