"""Held-out accuracy of the demo's objectives over seeds, with controls; into one JSON file.

    python -m benchmarks.learning --output learning.json [--hh FILE]

On the embedded sample every objective of `plans/demo.yaml` is trained with every seed; DPO also
with half of the training labels turned round, and with the other half (`runs.Task`), which must
leave nothing to learn. With `--hh`, a file of HH transcripts, DPO is trained on 300 of its pairs
too. Nothing is tuned here: the plan's values were chosen on a part of the sample's training pairs.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import bootstrap, sem, t

from benchmarks.learning.runs import Task, prepare, run, shuffle_labels, write_plan

_PROJECT = Path(__file__).resolve().parents[2]
_DEMO = _PROJECT / "plans" / "demo.yaml"
_SAMPLE = _PROJECT / "sample" / "preferences.jsonl"
_OBJECTIVES = ("dpo", "ipo", "simpo", "kto")


def main() -> None:
    """Run what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("learning.json"))
    parser.add_argument("--store", type=Path, default=_PROJECT / "store" / "learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="*", default=_OBJECTIVES, choices=_OBJECTIVES)
    parser.add_argument("--hh", type=Path, help="HH transcripts, JSON lines, plain or gzipped")
    parser.add_argument("--hh-pairs", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    store = options.store.resolve()
    tasks: list[tuple[Task, dict[str, Any]]] = [
        (Task("sample", o, s), {}) for o in options.objectives for s in options.seeds
    ]
    for seed in options.seeds if "dpo" in options.objectives else ():
        plan = write_plan(Task("sample", "dpo", seed), _DEMO, store, {})
        for labels in ("shuffled", "mirrored"):
            file = store / f"{labels}_{seed}.jsonl"
            shuffle_labels(plan, _SAMPLE, seed, file, mirrored=labels == "mirrored")
            source = {"path": str(file), "shape": "conversational"}
            tasks.append((Task("sample", "dpo", seed, labels), {"sources": {"sample": source}}))
    if options.hh is not None:
        source = {"path": str(options.hh.resolve()), "shape": "hh"}
        changes = {"sources": {"hh": source}, "limit_pairs": options.hh_pairs}
        tasks += [(Task("hh", "dpo", seed), changes) for seed in options.seeds]
    plans = {task: write_plan(task, _DEMO, store, changes) for task, changes in tasks}
    # The reference of each data set once, on all cores; the runs then find it in the ledger.
    for _, same in groupby(sorted(plans, key=lambda t: t.data), key=lambda t: t.data):
        kl_first = sorted(same, key=lambda t: t.objective != "kto")
        prepare(plans[kl_first[0]])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.processes))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        results = list(pool.map(run, plans, plans.values()))
    rows = _summary(results)
    options.output.write_text(json.dumps({"summary": rows, "runs": results}, indent=1))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=3):
        sys.stdout.write(f"{pl.DataFrame(rows)}\n{options.output}\n")


def _summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per data set, objective and labelling: the mean of its runs with 95 % intervals.

    `low` and `high` are over held-out prompts, for these very policies; `runs_low` and `runs_high`
    are Student's over the runs, which is what counts where each run has labels of its own.
    """

    def kind(result: dict[str, Any]) -> tuple[str, str, str]:
        return result["data"], result["labels"], result["objective"]

    groups = {key: list(runs) for key, runs in groupby(sorted(results, key=kind), key=kind)}
    turned = [run for (_, labels, _), runs in groups.items() if labels != "true" for run in runs]
    if turned:
        groups["sample", "shuffled + mirrored", "dpo"] = turned
    rows = []
    for (data, labels, objective), runs in groups.items():
        correct = np.mean([r["correct"] for r in runs], axis=0)
        low, high = _interval(correct, runs[0]["prompts"])
        means = [float(np.mean(r["correct"])) for r in runs]
        over_runs = t.interval(0.95, len(runs) - 1, np.mean(means), sem(means))
        baseline = {b["key"]: b["accuracy"] for b in runs[0]["baselines"]["rows"]}
        rows.append(
            {
                "data": data,
                "labels": labels,
                "objective": objective,
                "n_held_out": len(correct),
                "n_trained": runs[0]["n_trained"],
                "runs": " ".join(f"{mean:.3f}" for mean in means),
                "accuracy": float(correct.mean()),
                "low": low,
                "high": high,
                "runs_low": float(over_runs[0]) if len(runs) > 1 else None,
                "runs_high": float(over_runs[1]) if len(runs) > 1 else None,
                "own_score": float(np.mean([r["own_correct"] for r in runs])),
                "length": baseline["length"],
                "words": baseline["words"],
                "untrained": baseline["reference_sum"],
            }
        )
    return rows


def _interval(correct: np.ndarray, prompts: list[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, resampling prompts: their pairs hang together."""
    by_prompt = pl.DataFrame({"prompt": prompts, "correct": correct}).group_by("prompt").mean()
    values = by_prompt.sort("prompt")["correct"].to_numpy()
    found = bootstrap((values,), np.mean, n_resamples=9999, rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


if __name__ == "__main__":
    main()
