"""The page on shapes: every shape has a section, and its examples are read."""

import json
import re

import pytest
from published import read_rows, rules
from support import PROJECT

from pipeline.sources import READERS
from pipeline.sources.fields import PAIR_SCORES
from pipeline.sources.lists import TEXTS

PAGE = (PROJECT / "docs" / "shapes.md").read_text("utf-8")
SECTIONS = {
    shape: body
    for title, body in re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", PAGE, re.MULTILINE)
    for shape in re.findall(r"`(\w+)`", title)
}


def examples(section: str) -> list[dict[str, object]]:
    """The objects in a section's JSON blocks."""
    found = []
    for block in re.findall(r"```json\n(.+?)```", section, re.DOTALL):
        rest = block
        while rest := rest.strip():
            value, end = json.JSONDecoder().raw_decode(rest)
            found.append(value)
            rest = rest[end:]
    return found


def test_every_shape_has_its_section() -> None:
    assert set(SECTIONS) == set(READERS)


@pytest.mark.parametrize("shape", READERS)
def test_the_examples_are_of_their_shape(shape: str) -> None:
    rows = examples(SECTIONS[shape])
    assert rows
    for row in rows:
        (unit,) = read_rows(shape, row)
        assert rules([unit]) == []


def test_the_names_on_the_page_are_the_codes() -> None:
    named = {tuple(pair) for pair in re.findall(r"`([\w-]+)`/`([\w-]+)`", PAGE)}
    assert named == set(PAIR_SCORES)
    assert set(TEXTS) <= set(re.findall(r"`(\w+)`", SECTIONS["ranked"]))
    order = re.search(r"more particular before the more general: (.+?)\. So", PAGE, re.DOTALL)
    assert order
    assert re.findall(r"`(\w+)`", order[1]) == list(READERS)
