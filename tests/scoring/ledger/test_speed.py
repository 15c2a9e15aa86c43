"""How long it takes to know that everything is scored; see `benchmarks.ledger`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import measured

from benchmarks.ledger.work import prepare

SCRIPT = """
import json, sys
from pathlib import Path
from benchmarks.ledger.work import run_again
print(json.dumps([vars(run_again(Path(sys.argv[1]))) for _ in range(2)]))
"""


def runs(root: Path, n_pairs: int) -> list[dict[str, Any]]:
    """Two runs, in a process in which nothing else has been imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(prepare(root, n_pairs))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("n_pairs", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_scored_plan_is_known_in_three_seconds_and_nothing_is_loaded(
    n_pairs: int, tmp_path: Path
) -> None:
    found = runs(tmp_path / "desk", n_pairs)
    for run in found:
        assert (run["n_scored"], run["n_held"]) == (0, 2 * n_pairs)
        assert not run["loaded_torch"]
    seconds = min(run["seconds"] for run in found)
    measured(f"{n_pairs:,} scored pairs known in {seconds:.2f} s")
    assert seconds <= 3
