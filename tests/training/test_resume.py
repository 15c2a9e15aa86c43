"""Killed in the middle of scoring and started again: the published numbers are the same."""

import json
import time
from pathlib import Path
from typing import Any

from forks import KILLED, begin, ended

from pipeline import stages
from pipeline.intake import run_intake
from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.store import current_snapshot

TABLES = ["pairs", "sequences", "training_steps/dpo", "rewards/dpo"]


def whole_plan(path: Path, root: Path) -> None:
    """From the source to the report; a note says how many sequences were scored of each."""
    plan = load_plan(path, [f"store={root}"])
    store = store_of(plan)
    run_intake(plan, store)
    stages.tokenize(plan, store)
    scored = {"base": stages.score(plan, store, "base").n_scored}
    stages.train(plan, store, "dpo")
    scored["dpo"] = stages.score(plan, store, "dpo").n_scored
    stages.compute_rewards(plan, store, "dpo")
    stages.write_report(plan, store, "dpo")
    (root / "scored.json").write_text(json.dumps(scored))


def finished(path: Path, root: Path) -> dict[str, int]:
    assert ended(begin(whole_plan, path, root)) == 0
    scored: dict[str, int] = json.loads((root / "scored.json").read_text())
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
    assert finished(plan, undisturbed) == {"base": 240, "dpo": 240}

    process = begin(whole_plan, plan, killed)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("ledger/*/*/manifest/*.json"))) < 5:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    assert ended(process) == KILLED
    committed = len(list(killed.glob("ledger/*/*/manifest/*.json")))
    assert 5 <= committed < 30, "killed in the middle: 30 parts are the whole"

    assert finished(plan, killed) == {"base": 240 - 8 * committed, "dpo": 240}
    assert published(plan, killed) == published(plan, undisturbed)
    other = tmp_path / "control"
    assert finished(write_plan(training={"max_steps": 3}), other)["base"] == 24
    assert published(plan, other) != published(plan, undisturbed)
