"""Pandera's own switches must not let bad data through."""

import os
import subprocess
import sys

import pytest

TRY = """
from pipeline.intake.rows.contract import apply_contract
from pipeline.intake.rows.units import unit_frame
from pipeline.rules import actions
from pipeline.sources import Unit
place = {"ordinal": 0, "unit": 0, "source": "s", "file": "f", "row": 0, "evaluation": False}
bad = Unit([{"role": "user", "content": "x"}], " ", "y")
kept, rejected = apply_contract(unit_frame([(place, bad)]), actions({}))
print(kept.height, rejected["rule"].to_list())
"""


def attempt(**switches: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **switches}
    return subprocess.run(
        [sys.executable, "-c", TRY], env=environment, capture_output=True, text=True, check=False
    )


def test_a_bad_row_is_refused() -> None:
    assert attempt().stdout.strip() == "0 ['empty_reply']"


@pytest.mark.parametrize(
    "switch", [{"PANDERA_VALIDATION_ENABLED": "False"}, {"PANDERA_VALIDATION_DEPTH": "SCHEMA_ONLY"}]
)
def test_nothing_runs_with_validation_off(switch: dict[str, str]) -> None:
    done = attempt(**switch)
    assert done.returncode != 0
    assert "unset PANDERA_VALIDATION_ENABLED" in done.stderr
    assert done.stdout == ""
