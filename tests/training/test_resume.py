"""Killed in the middle of scoring and started again: the published numbers are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.store import current_snapshot

STAGES = """
import json, sys
from pathlib import Path
from pipeline import stages
from pipeline.intake import run_intake
from pipeline.names import store_of
from pipeline.plan import load_plan

plan = load_plan(Path(sys.argv[1]), sys.argv[2:])
store = store_of(plan)
run_intake(plan, store)
stages.tokenize(plan, store)
scored = {"base": stages.score(plan, store, "base").n_scored}
stages.train(plan, store, "dpo")
scored["dpo"] = stages.score(plan, store, "dpo").n_scored
stages.compute_rewards(plan, store, "dpo")
stages.write_report(plan, store, "dpo")
print(json.dumps(scored))
"""
TABLES = ["pairs", "sequences", "training_steps/dpo", "rewards/dpo"]


def start(plan: Path, store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGES, str(plan), f"store={store}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    scored: dict[str, int] = json.loads(said)
    return scored


def published(plan: Path, store: Path) -> list[str]:
    where = store_of(load_plan(plan, [f"store={store}"]))
    digests = [current_snapshot(where, name).digest for name in TABLES]
    return [*digests, current_snapshot(where, "reports/dpo", ".html").digest]


def test_sigkill_in_the_middle_of_scoring(
    write_plan: Any, write_pairs: Any, tmp_path: Path
) -> None:
    plan = write_plan(
        scoring={"commit_rows": 8, "null_test_rows": 2}, training={"max_steps": 2, "batch_pairs": 4}
    )
    write_pairs(120)  # the plan's own file, now long enough to be caught in the middle
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert finish(start(plan, undisturbed)) == {"base": 240, "dpo": 240}

    process = start(plan, killed)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("ledger/*/*/manifest/*.json"))) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    committed = len(list(killed.glob("ledger/*/*/manifest/*.json")))
    assert 5 <= committed < 30, "killed in the middle: 30 parts are the whole"

    assert finish(start(plan, killed)) == {"base": 240 - 8 * committed, "dpo": 240}
    assert published(plan, killed) == published(plan, undisturbed)
    other = tmp_path / "control"
    assert finish(start(write_plan(training={"max_steps": 3}), other))["base"] == 24
    assert published(plan, other) != published(plan, undisturbed)
