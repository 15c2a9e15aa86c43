"""What is measured, each in a process of its own."""

import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.intake.rows import lines
from benchmarks.intake.watch import peak_of


def write(source: Path, truth: Path, n: int) -> None:
    """Write `n` rows, and which of them are garbage under which rule."""
    with source.open("wb") as rows, truth.open("w") as rules:
        for number, (line, rule) in enumerate(lines(n)):
            rows.write(line + b"\n")
            if rule is not None:
                rules.write(json.dumps({"row": number, "expected": rule}) + "\n")


def intake(source: Path, store: Path, rules: dict[str, str]) -> None:
    """Take a file in."""
    from pipeline.intake import run_intake
    from pipeline.plan import Plan
    from pipeline.store import Store

    plan = Plan.model_validate(
        {
            "name": "intake",
            "sources": {"rows": {"path": source, "shape": "conversational"}},
            "models": {"m": {"checkpoint": "none"}},
            "rules": rules,
        }
    )
    result = run_intake(plan, Store(store, "intake"))
    assert result.law["holds"].all(), result.law


def compared(store: Path, truth: Path) -> dict[str, Any]:
    """Quarantine and truth, row by row."""
    found = pl.read_parquet(store / "intake" / "quarantine" / "current.parquet", glob=False)
    expected = pl.read_ndjson(truth)
    both = expected.join(found.select("row", "rule"), on="row", how="full", coalesce=True)
    wrong = both.filter(pl.col("rule") != pl.col("expected"))
    counts = {
        "garbage": expected.height,
        "quarantined": found.height,
        "missed": both.filter(pl.col("rule").is_null()).height,
        "wrongly_rejected": both.filter(pl.col("expected").is_null()).height,
        "wrong_rule": wrong.height,
        "by_rule": dict(sorted(Counter(found["rule"].to_list()).items())),
    }
    return {**counts, "exact": both.height == both.filter(rule=pl.col("expected")).height}


def child(function: Any, *arguments: Any) -> tuple[float, int]:
    """Run a function in a process of its own; its seconds after imports, and its peak memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_timed, args=(sender, function, *arguments))
    process.start()
    assert process.pid is not None
    peak = peak_of(process.pid, process.is_alive)
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")
    return float(receiver.recv()), peak


def _timed(sender: Any, function: Any, *arguments: Any) -> None:
    import pipeline.intake  # noqa: F401  # imported before the clock starts

    began = time.perf_counter()
    function(*arguments)
    sender.send(time.perf_counter() - began)
