"""Time and memory of the intake over many rows, and whether it finds just the garbage.

python -m benchmarks.intake            # 250,000 and 1,000,000 rows
python -m benchmarks.intake --rows 20000

Every figure is of processes of their own, so that what one phase keeps in memory is not counted
for another. Memory is the largest sum of the proportional set sizes of all processes.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.intake.rows import lines
from benchmarks.intake.watch import peak_of

_WITHOUT = {"near_eval": "off"}
"""Near-duplicate search is timed apart."""


def main() -> int:
    """Run it; 0 if the quarantine is exactly the garbage at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where files and tables go; default temporary")
    parser.add_argument("--output", type=Path, default=Path("intake.json"))
    parser.add_argument("--near", action="store_true", help="also with near-duplicate search")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = [_measured(Path(folder), n, options.near) for n in options.rows]
    for smaller, larger in pairwise(results):
        grown = larger["peak_bytes"] - smaller["peak_bytes"]
        larger["bytes_per_row"] = grown / (larger["rows"] - smaller["rows"])
        _say(f"growth from {smaller['rows']:,} to {larger['rows']:,} rows: "
              f"{larger['bytes_per_row']:.0f} bytes a row")  # fmt: skip
    options.output.write_text(json.dumps(results, indent=2))
    return 0 if all(result["exact"] for result in results) else 1


def _measured(folder: Path, n: int, near: bool) -> dict[str, Any]:
    source, truth = folder / f"rows_{n}.jsonl", folder / f"truth_{n}.jsonl"
    _child(_write, source, truth, n)
    seconds, peak = _child(_intake, source, folder / f"store_{n}", _WITHOUT)
    result: dict[str, Any] = {"rows": n, "file_bytes": source.stat().st_size,
                              "seconds": seconds, "peak_bytes": peak}  # fmt: skip
    result |= _compared(folder / f"store_{n}", truth)
    _say(f"{n:,} rows, {result['file_bytes'] / 1e6:.0f} MB: {seconds:.1f} s, "
          f"peak {peak / 1e9:.2f} GB; {result['quarantined']:,} quarantined, of "
          f"{result['garbage']:,} garbage; missed {result['missed']}, wrong rule "
          f"{result['wrong_rule']}, valid ones rejected {result['wrongly_rejected']}")  # fmt: skip
    if near:
        seconds, peak = _child(_intake, source, folder / f"near_{n}", {})
        result |= {"near_seconds": seconds, "near_peak_bytes": peak}
        _say(f"  with near-duplicate search {seconds:.1f} s, peak {peak / 1e9:.2f} GB")
    return result


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _write(source: Path, truth: Path, n: int) -> None:
    with source.open("wb") as rows, truth.open("w") as rules:
        for number, (line, rule) in enumerate(lines(n)):
            rows.write(line + b"\n")
            if rule is not None:
                rules.write(json.dumps({"row": number, "expected": rule}) + "\n")


def _intake(source: Path, store: Path, rules: dict[str, str]) -> None:
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


def _compared(store: Path, truth: Path) -> dict[str, Any]:
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


def _child(function: Any, *arguments: Any) -> tuple[float, int]:
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


if __name__ == "__main__":
    sys.exit(main())
