"""Tokenisation beside TRL's `dataset.map`: alternating runs, each in a process of its own.

    python -m benchmarks.tokenization --pairs 5000 --repeats 3

Ours ends with the published tables on disk, TRL's with a data set in memory. Each process makes
the same conversations and loads the same tokeniser before the clock starts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.tokenization.runs import WAYS

_PROJECT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[5000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--tokenizer", type=Path, help="default: the packaged model's")
    parser.add_argument("--output", type=Path, help="all numbers, as JSON")
    options = parser.parse_args()
    tokenizer = options.tokenizer or _packaged()
    found = []
    for n in options.pairs:
        for _ in range(options.repeats):
            found += [_run(way, n, tokenizer) for way in options.ways]
        _print_table([run for run in found if run["n"] == n], options.ways)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1))


def _packaged() -> Path:
    from pipeline.models import resolve
    from pipeline.plan import ModelConfig
    from pipeline.store import Store

    config = ModelConfig(checkpoint="packaged:smollm2-135m-instruct")
    return resolve(config, Store(_PROJECT / "store", "benchmark")).path


def _run(way: str, n: int, tokenizer: Path) -> dict[str, Any]:
    # The tokenizers library's own choice of threads, whatever the shell says.
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-m", "benchmarks.tokenization.runs", way, str(n), str(tokenizer)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.2)
        said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{way}: status {process.returncode}")
    run: dict[str, Any] = json.loads(said.splitlines()[-1])
    return {**run, "mb": peak}


def _memory(pid: int) -> float:
    """What a process and those it started hold, in MB; a shared page counts once (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0.0
    held = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return held / 1024 + sum(map(_memory, map(int, children)))


def _print_table(runs: list[dict[str, Any]], ways: list[str]) -> None:
    seconds = {way: [run["seconds"] for run in runs if run["way"] == way] for way in ways}
    base = statistics.median(seconds[ways[0]])
    tokens = {run["tokens"] for run in runs}
    print(f"\n{runs[0]['n']} pairs, {' or '.join(map(str, sorted(tokens)))} tokens")
    for way in ways:
        middle = statistics.median(seconds[way])
        cpu = statistics.median(run["cpu"] for run in runs if run["way"] == way)
        memory = max(run["mb"] for run in runs if run["way"] == way)
        print(
            f"{way:6} median {middle:7.2f} s ({min(seconds[way]):.2f} to {max(seconds[way]):.2f}), "
            f"{runs[0]['n'] / middle:6.0f} pairs/s, {middle / base:5.2f} x, "
            f"{cpu:6.2f} core seconds, peak {memory:5.0f} MB"
        )


if __name__ == "__main__":
    main()
