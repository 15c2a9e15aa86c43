"""The sample's bad rows: each kind of input the intake rejects, merges or flags is among them."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from desk import Desk
from support import PROJECT

from pipeline.rules import INTAKE, RULES
from schemas import LabelCandidate, PairCandidate
from schemas.intake import DISPOSITIONS

FILES = {
    "pairs": "bad_rows.jsonl",
    "hh": "bad_rows_hh.jsonl",
    "ultrafeedback": "bad_rows_ultrafeedback.jsonl",
    "scored": "bad_rows_scored.jsonl",
    "helpsteer": "bad_rows_helpsteer.jsonl",
}
"""Source to its file in `sample/`."""

QUARANTINED = {
    "pairs": [
        (1, "invalid_utf8"),
        (2, "lone_surrogate"),
        (3, "not_an_object"),
        (4, "duplicate_key"),
        (5, "nan_literal"),
        (6, "nan_literal"),
        (7, "too_deep"),
        (9, "missing_field"),
        (10, "missing_field"),
        (11, "wrong_type"),
        (12, "wrong_type"),
        (13, "wrong_type"),
        (14, "wrong_type"),
        (15, "strength_not_finite"),
        (16, "unsupported_content"),
        (17, "unsupported_content"),
        (18, "no_reply"),
        (19, "prompts_differ"),
        (20, "empty_prompt"),
        (21, "unknown_role"),
        (22, "empty_reply"),
        (23, "identical_replies"),
        (26, "contradicted"),
        (27, "contradicted"),
        (30, "invalid_json"),
        (31, "score_contradicts_label"),
        (32, "tied"),
    ],
    "hh": [(1, "not_a_transcript"), (2, "wrong_type"), (3, "empty_reply")],
    # Of row 2, one completion; its other two are a pair.
    "ultrafeedback": [(1, "tied"), (2, "score_contradicts_label"), (3, "no_rival")],
    "scored": [(1, "lengths_differ")],
    "helpsteer": [(1, "score_out_of_scale")],
}
KEPT = {
    "pairs": [
        (0, "accepted"),
        (8, "accepted"),
        # 24 is blank: not a row, but counted in the row numbers.
        (25, "merged"),
        (28, "accepted"),
        (29, "accepted"),
        *((row, "accepted") for row in range(33, 40)),
    ],
    "hh": [(0, "accepted"), (4, "accepted")],
    "ultrafeedback": [(0, "accepted"), (2, "accepted")],
    "scored": [(0, "accepted")],
    "helpsteer": [(0, "accepted")],
}
FLAGGED = [
    (28, ["role_repeated"]),
    (33, ["near_identical"]),
    (34, ["preference_cycle"]),
    (35, ["preference_cycle"]),
    (36, ["preference_cycle"]),
    (37, ["cut_off"]),
    (38, ["mojibake"]),
    (39, ["odd_characters"]),
]

_ANOTHER_FORMAT = "is about files of another format (tests/intake/files)"
_ANOTHER_SHAPE = "needs another shape (tests/intake/shapes)"
LEFT_OUT = {
    "row_too_long": "the row would be larger than 64 MiB",
    "broken_framing": _ANOTHER_FORMAT,
    "invalid_csv": _ANOTHER_FORMAT,
    "byte_order_mark": "every line of the file is shown as it is",
    "no_prompt": _ANOTHER_SHAPE,
    "gap_too_small": "needs a plan with a `min_gap`",
    "too_many_rivals": "the row would have more than 200 candidates (tests/intake/test_rules.py)",
    "not_paired": "needs rivals in rows of their own (tests/intake/test_rules.py)",
    "near_eval": "needs an evaluation source",
    "contaminated": "needs an evaluation source",
}
"""Rules of the intake that no row of these files breaks, and why."""


def test_every_row_meets_its_fate(desk: Desk) -> None:
    n_in = {}
    for source, file in FILES.items():
        data = (PROJECT / "sample" / file).read_bytes()
        desk.write(f"{source}.jsonl", data)
        n_in[source] = sum(line != b"" for line in data.split(b"\n"))
    result = desk.run(*FILES)

    for source in FILES:
        rejected = f"select row, rule from quarantine where source = '{source}' order by row"
        assert desk.ask(rejected) == QUARANTINED[source]
        kept = (
            f"select row, disposition from rows where source = '{source}' "
            "and disposition != 'quarantined' order by row"
        )
        assert desk.ask(kept) == KEPT[source]
    # Of the rules that are all tried on a pair, none is broken along with another.
    assert desk.ask("select rule from quarantine where detail like 'breaks %, %'") == []
    assert desk.ask("select row, flags from pairs where len(flags) > 0 order by row") == FLAGGED
    assert desk.ask(
        "select rows.row, pairs.row, votes from rows join pairs on duplicate_of = pairs.pair_id"
    ) == [(25, 0, 2)]

    assert result.law.rows() == [
        ("pairs", 39, 11, 1, 27, True),
        ("hh", 5, 2, 0, 3, True),
        ("ultrafeedback", 4, 2, 0, 2, True),
        ("scored", 2, 1, 0, 1, True),
        ("helpsteer", 2, 1, 0, 1, True),
    ]
    assert dict(result.law.select("source", "n_in").rows()) == n_in


def rules_raised(source: str) -> set[str]:
    """The first argument of every `RowError` and `PairError` in a module, be it a variable."""
    tree = ast.parse(source)
    assigned: dict[str, list[ast.expr]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                assigned[ast.unparse(target)].append(node.value)

    def texts(value: ast.expr) -> set[str]:
        match value:
            case ast.Constant(value=str(text)):
                return {text}
            case ast.IfExp(body=body, orelse=orelse):
                return texts(body) | texts(orelse)
            case ast.Starred():  # a fault that was found when the row was cut out
                return set()
            case ast.Name(id=name) if name in assigned:
                return set().union(*map(texts, assigned[name]))
        raise ValueError(f"line {value.lineno}: no rule can be read from {ast.unparse(value)}")

    return set().union(
        *(
            texts(node.args[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("RowError", "PairError")
        )
    )


def rules_of_the_contract() -> set[str]:
    contracts = [PairCandidate.to_schema(), LabelCandidate.to_schema()]
    return {str(check.error) for contract in contracts for check in contract.checks}


def modules() -> list[Path]:
    return [path for room in ("pipeline", "schemas") for path in (PROJECT / room).rglob("*.py")]


def test_every_rule_has_a_row_or_a_reason() -> None:
    shown = {rule for rows in QUARANTINED.values() for _, rule in rows}
    shown |= {flag for _, flags in FLAGGED for flag in flags} | {"duplicate"}
    of_the_intake = {r.name for r in RULES.values() if r.stage in INTAKE}
    assert of_the_intake - shown - LEFT_OUT.keys() == set(), "no row shows these"
    assert shown | LEFT_OUT.keys() == of_the_intake
    assert shown & LEFT_OUT.keys() == set()
    assert {fate for _, fate in KEPT["pairs"]} | {"quarantined"} == set(DISPOSITIONS)


def test_every_rule_that_is_raised_is_known() -> None:
    raised = set().union(*(rules_raised(path.read_text()) for path in modules()))
    assert len(raised) > 20
    assert raised | rules_of_the_contract() <= RULES.keys()
    # The control: a rule that nobody has written down.
    assert not rules_raised('raise RowError("a_new_one", "")') <= RULES.keys()


def test_no_rule_escapes_the_search() -> None:
    assert rules_raised('raise RowError("a", y)\nerror = base.PairError("b", y)') == {"a", "b"}
    assert rules_raised('rule = "a" if x else "b"\nraise RowError(rule, "")') == {"a", "b"}
    assert rules_raised('raise SourceError("a")') == set()
    assert rules_raised("raise RowError(*row.fault)") == set()
    for hidden in ('raise RowError(f"a_{x}", "")', 'raise RowError(rule, "")'):
        with pytest.raises(ValueError, match="line 1: no rule can be read"):
            rules_raised(hidden)
