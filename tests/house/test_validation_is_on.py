"""Pandera's own switches must not let bad data through."""

import os
import subprocess
import sys

import pytest

TRY = """
import polars as pl
from pipeline.intake.validate import CANDIDATE_SCHEMA, apply_contract
bad = {"prompt": [{"role": "user", "content": "x"}], "chosen": " ", "rejected": "y"}
kept, rejected = apply_contract(pl.DataFrame([bad], schema=CANDIDATE_SCHEMA))
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
