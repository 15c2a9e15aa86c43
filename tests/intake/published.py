"""Files as they are published, one for each shape, all with the same two preferences if they can.

The fields and their order are those of the data sets' cards; the text is ours.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.sources import (
    READERS,
    Read,
    ReadOptions,
    RowError,
    Unit,
    frame_rows,
    parse_object,
)

Row = dict[str, Any]

SYSTEM = "You answer in one line."
Q1, A1, Q2 = "What is a\nfjord? ", "A sea inlet between cliffs.", "Name a long one."
GOOD, BAD = "The Sognefjord, about 205 km.", "The Sognefjord, about 2,050 km."
Q3, GOOD3, BAD3 = "Translate »hund« to English.", "Dog.", "Hound dog puppy, and so on."


def turn(role: str, content: Any) -> Any:
    return {"role": role, "content": content}


def user(content: str) -> Any:
    return turn("user", content)


def said(content: str) -> Any:
    return turn("assistant", content)


DIALOGUE = [user(Q1), said(A1), user(Q2)]
ASKED = [user(Q3)]

Pair = tuple[list[Any], str, str]
LONG: Pair = (DIALOGUE, GOOD, BAD)
LONG_SYSTEM: Pair = ([turn("system", SYSTEM), *DIALOGUE], GOOD, BAD)
SHORT: Pair = (ASKED, GOOD3, BAD3)
STRIPPED: Pair = ([user(Q1.strip()), said(A1), user(Q2)], GOOD, BAD)
"""What remains of `LONG` where a shape's readers take off the white space round a turn."""


@dataclass(frozen=True)
class Published:
    """A file: its shape, its rows, and the pairs that stand in it."""

    shape: str
    rows: list[Row]
    pairs: list[Pair]
    options: ReadOptions = field(default_factory=ReadOptions)


def human(value: str) -> Row:
    return {"from": "human", "value": value}


def gpt(value: str) -> Row:
    return {"from": "gpt", "value": value}


def hh(*turns: str) -> str:
    return "".join(
        f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(turns)
    )


def rated(response: str, overall: float, fine: float, model: str) -> Row:
    """A completion of UltraFeedback, as of December 2023."""
    rating = {"Rating": str(int(fine)), "Rationale": "As said."}
    return {
        "annotations": {"helpfulness": {**rating, "Type": ["1"]}, "honesty": rating},
        "custom_system_prompt": "As an AI assistant, be helpful.",
        "critique": "Fine.",
        "fine-grained_score": fine,
        "model": model,
        "overall_score": overall,
        "principle": "helpfulness",
        "response": response,
    }


FILES: dict[str, Published] = {
    "TRL, explicit": Published(
        "conversational",
        [
            {"prompt": DIALOGUE, "chosen": [said(GOOD)], "rejected": [said(BAD)]},
            {"prompt": ASKED, "chosen": [said(GOOD3)], "rejected": [said(BAD3)]},
        ],
        [LONG, SHORT],
    ),
    "TRL, implicit": Published(
        "conversational",
        [
            {"chosen": [*DIALOGUE, said(GOOD)], "rejected": [*DIALOGUE, said(BAD)]},
            {"chosen": [*ASKED, said(GOOD3)], "rejected": [*ASKED, said(BAD3)]},
        ],
        [LONG, SHORT],
    ),
    "UltraFeedback, binarised": Published(
        "conversational",
        [
            {
                "prompt": Q3,
                "prompt_id": "84b6",
                "chosen": [*ASKED, said(GOOD3)],
                "rejected": [*ASKED, said(BAD3)],
                "messages": [*ASKED, said(GOOD3)],
                "score_chosen": 8.5,
                "score_rejected": 4,
            }
        ],
        [SHORT],
    ),
    "Argilla, Capybara": Published(
        "argilla",
        [
            {
                "source": "Dove",
                "conversation": [{"input": Q1, "output": A1}, {"input": Q2, "output": GOOD}],
                "original_response": GOOD,
                "prompt": Q2,
                "chosen": [*DIALOGUE, said(GOOD)],
                "rejected": [*DIALOGUE, said(BAD)],
                "rating_chosen": 5,
                "rating_rejected": 3,
                "chosen_model": "Dove",
                "rejected_model": "notus7b",
            }
        ],
        [LONG],
    ),
    "Argilla, DPO mix": Published(
        "argilla",
        [
            {
                "dataset": "capybara",
                "chosen": [*DIALOGUE, said(GOOD)],
                "rejected": [*DIALOGUE, said(BAD)],
                "chosen_rating": 5.0,
                "rejected_rating": 3.0,
            },
            {
                "dataset": "ultrafeedback",
                "chosen": [*ASKED, said(GOOD3)],
                "rejected": [*ASKED, said(BAD3)],
                "chosen_rating": 4.75,
                "rejected_rating": 2.5,
            },
        ],
        [LONG, SHORT],
    ),
    "TRL, standard": Published(
        "standard", [{"prompt": Q3, "chosen": GOOD3, "rejected": BAD3}], [SHORT]
    ),
    "TRL, standard and implicit": Published(
        "standard", [{"chosen": f"{Q3}\n{GOOD3}", "rejected": f"{Q3}\n{BAD3}"}], [SHORT]
    ),
    "a transcript as the prompt": Published(
        "standard",
        [
            {"prompt": hh(Q1, A1, Q2, ""), "chosen": f" {GOOD}", "rejected": f" {BAD}"},
            {"prompt": hh(Q3) + "\n\nAssistant:", "chosen": GOOD3, "rejected": BAD3},
        ],
        [STRIPPED, SHORT],
    ),
    "HH-RLHF": Published(
        "hh",
        [
            {"chosen": hh(Q1, A1, Q2, GOOD), "rejected": hh(Q1, A1, Q2, BAD)},
            {"chosen": hh(Q3, GOOD3), "rejected": hh(Q3, BAD3)},
        ],
        [STRIPPED, SHORT],
    ),
    "LLaMA-Factory, sharegpt": Published(
        "sharegpt",
        [
            {
                "conversations": [human(Q1), gpt(A1), human(Q2)],
                "chosen": gpt(GOOD),
                "rejected": gpt(BAD),
                "system": SYSTEM,
                "tools": "",
            },
            {"conversations": [human(Q3)], "chosen": gpt(GOOD3), "rejected": gpt(BAD3)},
            {
                "conversations": [
                    {"from": "system", "value": SYSTEM},
                    human(Q1),
                    gpt(A1),
                    human(Q2),
                ],
                "chosen": gpt(GOOD),
                "rejected": gpt(BAD),
            },
        ],
        [LONG_SYSTEM, SHORT, LONG_SYSTEM],
    ),
    "LLaMA-Factory, alpaca": Published(
        "alpaca",
        [
            {
                "instruction": Q2,
                "input": "",
                "chosen": GOOD,
                "rejected": BAD,
                "system": SYSTEM,
                "history": [[Q1, A1]],
            },
            {
                "instruction": "Translate »hund«",
                "input": "to English.",
                "chosen": GOOD3,
                "rejected": BAD3,
            },
        ],
        [LONG_SYSTEM, ([user("Translate »hund«\nto English.")], GOOD3, BAD3)],
    ),
    "OpenAI": Published(
        "openai",
        [
            {
                "input": {"messages": m, "tools": [], "parallel_tool_calls": True},
                "preferred_output": [said(good)],
                "non_preferred_output": [said(bad)],
            }
            for m, good, bad in (LONG_SYSTEM, SHORT)
        ],
        [LONG_SYSTEM, SHORT],
    ),
    "NeMo": Published(
        "nemo",
        [
            {
                "context": DIALOGUE,
                "completions": [
                    {"rank": 1, "completion": [said(BAD)]},
                    {"rank": 0, "completion": [said(GOOD)]},
                ],
                "task_name": "geography",
            },
            {
                "context": ASKED,
                "completions": [
                    {"rank": 0, "completion": [said(GOOD3)]},
                    {"rank": 1, "completion": [said("A dog.")]},
                    {"rank": 2, "completion": [said(BAD3)]},
                ],
            },
        ],
        [LONG, SHORT],
    ),
    "Nectar": Published(
        "ranked",
        [
            {
                "prompt": hh(Q1, A1, Q2, ""),
                "answers": [
                    {"answer": GOOD, "model": "gpt-4", "rank": 1.0},
                    {"answer": "The Geirangerfjord.", "model": "llama-2-7b-chat", "rank": 2.0},
                    {"answer": BAD, "model": "mistral-7b", "rank": 3.0},
                ],
                "turns": 2,
                "num_responses": 3,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            }
        ],
        [STRIPPED],
    ),
    "a ranked list": Published(
        "ranked",
        [
            {"prompt": Q3, "responses": [GOOD3, "A dog.", BAD3]},
            {"prompt": DIALOGUE, "responses": [BAD, "Hm.", GOOD], "ranks": [3, 2, 1]},
        ],
        [SHORT, LONG],
    ),
    "scored candidates": Published(
        "scored",
        [
            {
                "prompt": Q3,
                "candidates": [
                    {"text": BAD3, "score": -1.25, "model": "a"},
                    {"text": GOOD3, "score": 2.5, "model": "b"},
                ],
            },
            {"prompt": DIALOGUE, "responses": [GOOD, "Hm.", BAD], "scores": [0.9, 0.5, 0.1]},
        ],
        [SHORT, LONG],
    ),
    "UltraFeedback": Published(
        "ultrafeedback",
        [
            {
                "source": "sharegpt",
                "instruction": Q3,
                "models": ["alpaca-7b", "gpt-4", "llama-2-7b-chat", "falcon-40b-instruct"],
                "completions": [
                    rated("A dog.", 7.0, 4.0, "alpaca-7b"),
                    rated(GOOD3, 8.5, 5.0, "gpt-4"),
                    rated(BAD3, 2.0, 1.5, "llama-2-7b-chat"),
                    rated("Perro.", 10, 1.0, "falcon-40b-instruct"),
                ],
                "correct_answers": [],
                "incorrect_answers": [],
            }
        ],
        [SHORT],
    ),
    "HelpSteer2, preference": Published(
        "helpsteer",
        [
            {
                "split": "train",
                "prompt": f"{Q1}\n<extra_id_1>Assistant\n{A1}\n<extra_id_1>User\n{Q2}",
                "response_1": GOOD,
                "response_2": BAD,
                "preference_strength": -2,
                "preference_statement": "Response 1 is better than Response 2.",
                "preference_elaboration": "2,050 km is wrong.",
            },
            {
                "split": "val",
                "prompt": Q3,
                "response_1": BAD3,
                "response_2": GOOD3,
                "preference_strength": 3,
                "preference_statement": "Response 2 is much better.",
                "preference_elaboration": "Short.",
            },
        ],
        [LONG, SHORT],
    ),
    "HelpSteer3": Published(
        "helpsteer",
        [
            {
                "domain": "general",
                "language": "english",
                "context": DIALOGUE,
                "response1": BAD,
                "response2": GOOD,
                "overall_preference": 1,
                "individual_preference": [{"score": 1, "reasoning": "The length."}],
            }
        ],
        [LONG],
    ),
}
"""Every file whose rows are pairs."""


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_file(path: Path, shape: str, options: ReadOptions | None = None) -> list[Read]:
    """What the reader makes of a file, a refused row being an entry."""
    found: list[Read] = []
    for raw in frame_rows(path):
        try:
            found += READERS[shape](parse_object(raw.data), options or ReadOptions())
        except RowError as error:
            found.append(error)
    return found


def read_rows(shape: str, *rows: Row, **options: Any) -> list[Read]:
    """What the reader makes of rows; a refused row raises."""
    return [unit for row in rows for unit in READERS[shape](row, ReadOptions(**options))]


def one_pair(shape: str, row: Row, **options: Any) -> Unit:
    """The only thing that a row gives."""
    (unit,) = read_rows(shape, row, **options)
    assert isinstance(unit, Unit)
    return unit


def refused(shape: str, row: Row, **options: Any) -> tuple[str, str]:
    """The rule and detail of a row that cannot be read as a whole."""
    with pytest.raises(RowError) as caught:
        read_rows(shape, row, **options)
    return caught.value.rule, caught.value.detail


def rules(found: list[Read]) -> list[str]:
    """Of what a row gives, the rules of what cannot be read."""
    return [unit.rule for unit in found if isinstance(unit, RowError)]
