"""The published files: found out, read, and the same pairs whatever the shape."""

import copy
from pathlib import Path

import polars as pl
import pytest
from published import (
    BAD3,
    FILES,
    GOOD,
    GOOD3,
    LONG,
    Q1,
    Q3,
    SHORT,
    STRIPPED,
    Published,
    read_file,
    user,
    write,
)

from pipeline.intake import run_intake
from pipeline.plan import Plan
from pipeline.sources import Label, RowError, Unit, shape_of
from pipeline.store import Store, read


def pairs_of(published: Published, folder: Path) -> list[Unit]:
    path = write(folder / "file.jsonl", published.rows)
    found = read_file(path, published.shape, published.options)
    return [unit for unit in found if isinstance(unit, Unit)]


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_its_pairs(name: str, tmp_path: Path) -> None:
    pairs = pairs_of(FILES[name], tmp_path)
    assert [(u.prompt, u.chosen, u.rejected) for u in pairs] == FILES[name].pairs


@pytest.mark.parametrize("name", FILES)
def test_the_shape_is_found_out(name: str, tmp_path: Path) -> None:
    found = shape_of(write(tmp_path / "file.jsonl", FILES[name].rows))
    # Argilla's files are conversational ones; the name is for plans.
    assert found == FILES[name].shape.replace("argilla", "conversational")


def test_the_same_pair_is_one_pair_whatever_its_shape(tmp_path: Path) -> None:
    """Through the whole intake: one `pair_id`, with a vote of every file that holds it."""
    sources = {
        f"s{i}": {
            "path": write(tmp_path / f"{i}.jsonl", published.rows),
            "shape": published.shape,
        }
        for i, published in enumerate(FILES.values())
    }
    plan = Plan.model_validate(
        {"name": "test", "sources": sources, "models": {"m": {"checkpoint": "none"}}}
    )
    store = Store(tmp_path / "store", "test")
    run_intake(plan, store)
    pairs = read(store, "pairs")

    def holding(*pair: object) -> list[str]:
        return sorted(f"s{i}" for i, f in enumerate(FILES.values()) if pair in f.pairs)

    for prompt, chosen, rejected in (LONG, SHORT, STRIPPED):
        (one,) = pairs.filter(
            pl.col("prompt") == pl.lit(prompt, dtype=pairs.schema["prompt"]),
            pl.col("chosen") == chosen,
            pl.col("rejected") == rejected,
        ).iter_rows(named=True)
        assert one["sources"] == holding(prompt, chosen, rejected)
        assert one["votes"] == len(one["sources"])
    assert len(holding(*SHORT)) >= 10  # the control: they do not all hold something else
    distinct = {repr(pair) for published in FILES.values() for pair in published.pairs}
    assert pairs["pair_id"].n_unique() == pairs.height == len(distinct)


def test_what_else_a_row_says_survives(tmp_path: Path) -> None:
    def first(name: str) -> Unit:
        return pairs_of(FILES[name], tmp_path)[0]

    binarised = first("UltraFeedback, binarised")
    assert (binarised.scores, binarised.strength) == ((8.5, 4.0), 4.5)
    assert binarised.meta == {"prompt_id": "84b6"}  # `messages` repeats `chosen`

    capybara = first("Argilla, Capybara")
    assert (capybara.scores, capybara.strength) == ((5.0, 3.0), 2.0)
    assert capybara.meta["chosen_model"] == "Dove"
    assert capybara.meta["original_response"] == GOOD

    assert first("OpenAI").meta == {"input": {"parallel_tool_calls": True}}
    assert first("NeMo").meta == {"task_name": "geography"}

    nectar = first("Nectar")
    assert (nectar.scores, nectar.strength) == (None, 2.0)
    assert nectar.meta["chosen_candidate"] == {"model": "gpt-4"}
    assert nectar.meta["rejected_candidate"] == {"model": "mistral-7b"}
    assert nectar.meta["turns"] == 2

    scored = first("scored candidates")
    assert (scored.scores, scored.strength) == ((2.5, -1.25), 3.75)

    feedback = first("UltraFeedback")
    assert feedback.scores == (8.5, 2.0)
    candidate = feedback.meta["chosen_candidate"]
    assert isinstance(candidate, dict)
    assert candidate["model"] == "gpt-4"
    assert candidate["annotations"]["honesty"]["Rationale"] == "As said."
    assert feedback.meta["source"] == "sharegpt"

    steer = first("HelpSteer3")
    assert (steer.scores, steer.strength) == (None, 1.0)
    assert steer.meta["language"] == "english"
    assert steer.meta["individual_preference"] == [{"score": 1, "reasoning": "The length."}]


def test_the_annotation_bug_of_ultrafeedback_is_an_error_of_one_completion(
    tmp_path: Path,
) -> None:
    """10 was given to responses that deserved a 1: the falcon's, which would have been the best."""
    published = FILES["UltraFeedback"]
    path = write(tmp_path / "file.jsonl", published.rows)
    error, unit = read_file(path, "ultrafeedback")
    assert isinstance(error, RowError)
    assert isinstance(unit, Unit)
    assert (error.rule, "completions[3]" in error.detail) == ("score_contradicts_label", True)
    assert unit.chosen == GOOD3

    row = copy.deepcopy(published.rows[0])
    row["completions"][3]["fine-grained_score"] = 2.25
    (unit,) = read_file(write(path, [row]), "ultrafeedback")
    assert isinstance(unit, Unit)
    assert unit.chosen == "Perro."


LABELLED = {
    "TRL, unpaired": (
        "unpaired",
        [
            {"prompt": Q3, "completion": GOOD3, "label": True},
            {"prompt": Q3, "completion": BAD3, "label": False},
        ],
    ),
    "TRL, unpaired and conversational": (
        "unpaired",
        [
            {"prompt": [user(Q3)], "completion": [said], "label": label}
            for said, label in (
                ({"role": "assistant", "content": GOOD3}, 1),
                ({"role": "assistant", "content": BAD3}, 0),
            )
        ],
    ),
    "Argilla, KTO mix": (
        "unpaired",
        [
            {
                "prompt": Q3,
                "completion": [user(Q3), {"role": "assistant", "content": text}],
                "label": label,
                "rating": 5,
            }
            for text, label in ((GOOD3, True), (BAD3, False))
        ],
    ),
    "LLaMA-Factory, messages": (
        "sharegpt",
        [
            {
                "messages": [
                    {"content": Q3, "role": "user"},
                    {"content": text, "role": "assistant"},
                ],
                "label": label,
            }
            for text, label in ((GOOD3, True), (BAD3, False))
        ],
    ),
    "LLaMA-Factory, kto_tag": (
        "sharegpt",
        [
            {
                "conversations": [{"from": "human", "value": Q3}, {"from": "gpt", "value": text}],
                "kto_tag": label,
            }
            for text, label in ((GOOD3, True), (BAD3, False))
        ],
    ),
    "LLaMA-Factory, alpaca": (
        "alpaca",
        [
            {"instruction": Q3, "input": "", "output": text, "kto_tag": label}
            for text, label in ((GOOD3, True), (BAD3, False))
        ],
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_a_file_of_labels_holds_its_labels(name: str, tmp_path: Path) -> None:
    shape, rows = LABELLED[name]
    path = write(tmp_path / "file.jsonl", rows)
    assert shape_of(path) == shape
    found = [unit for unit in read_file(path, shape) if isinstance(unit, Label)]
    assert [(u.prompt, u.completion, u.desirable) for u in found] == [
        ([user(Q3)], GOOD3, True),
        ([user(Q3)], BAD3, False),
    ]
    assert found[0].meta == ({"rating": 5} if name == "Argilla, KTO mix" else {})


def test_no_text_of_the_files_is_altered_but_round_the_turns() -> None:
    """The control of `STRIPPED`: the text has white space to lose."""
    assert Q1.strip() != Q1
    assert LONG != STRIPPED
