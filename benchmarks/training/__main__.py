"""Training speed against TRL: optimiser steps of full fine-tuning, in alternating runs.

    python -m benchmarks.training --output training.json [--hh FILE]

The pairs are the first usable ones of the file, in its order, 4 to an optimiser step; references
are given to both. TRL runs at its best setting (on a CPU a pair at a time with accumulation; what
it computes for its metrics alone left out) and with a step's pairs at once, as it is. Every run is
a process of its own, so that what it keeps resident is its own; its first step, on the shortest
pairs, is not counted. Ratios are of runs in one turn. On a GPU the memory is the GPU's, of tensors.

Nothing else should run meanwhile.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.devices import device_of
from benchmarks.gpu_check.processes import elsewhere
from benchmarks.training.work import Ran, ours, prepared, trls
from pipeline.plan import TrainingConfig
from pipeline.training.data.examples import Example

_PROJECT = Path(__file__).resolve().parents[2]
_SAMPLE = _PROJECT / "sample" / "preferences.jsonl"
_TRL = ("trl, best", "trl, at once")


def main() -> None:
    """Run what is asked for and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("training.json"))
    parser.add_argument("--store", type=Path, default=_PROJECT / "store" / "scoring")
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--pairs-file", type=Path, default=_SAMPLE, help="conversational pairs")
    parser.add_argument("--hh", type=Path, help="HH transcripts instead, JSON lines or gzipped")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--step-pairs", type=int, default=4, help="pairs to an optimiser step")
    parser.add_argument("--without", nargs="*", default=[], choices=_TRL)
    parser.add_argument("--micro-batch-tokens", type=int, nargs="*", default=[])
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: no GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    options.pairs = options.steps * options.step_pairs
    device, there = device_of(options.device)
    if options.dtype != "float32" and device == "cpu":
        parser.error("--dtype: a CPU trains in float32")
    checkpoint, batches = elsewhere(there, prepared, options)
    config = TrainingConfig(
        method=options.method, learning_rate=1e-6, schedule="constant", warmup_share=0.0
    )
    runs: dict[str, list[Ran]] = {}
    for turn in range(options.turns):
        tokens = options.micro_batch_tokens or [None]
        for most in tokens:
            name = "ours" if most is None else f"ours, {most} tokens"
            cut = config.model_copy(update={"micro_batch_tokens": most})
            ran = elsewhere(there, ours, checkpoint, batches, cut, options.dtype)
            _keep(runs, turn, name, ran)
        for name, micro, statistics in zip(
            _TRL,
            (1 if device == "cpu" else options.step_pairs, options.step_pairs),
            (False, True),
            strict=True,
        ):
            if name not in options.without:
                ran = elsewhere(
                    there, trls, checkpoint, batches, config, micro, statistics, options.dtype
                )
                _keep(runs, turn, name, ran)
    report = {
        "model": options.model,
        "method": options.method,
        "device": device,
        "dtype": options.dtype,
        "step_pairs": options.step_pairs,
        "file": (options.hh or options.pairs_file).name,
        "n_tokens": sum(e.n_tokens for batch in batches[1:] for e in batch),
        "n_unique_tokens": sum(_unique(e) for batch in batches[1:] for e in batch),
        "cores": len(os.sched_getaffinity(0)),
        "runs": {name: [vars(ran) for ran in ran_of] for name, ran_of in runs.items()},
        "ratios": _ratios(runs),
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{_shown(report)}\n{options.output}\n")


def _unique(example: Example) -> int:
    return len(example.prompt_ids) + sum(len(reply.ids) for reply in example.replies)


def _keep(runs: dict[str, list[Ran]], turn: int, name: str, ran: Ran) -> None:
    runs.setdefault(name, []).append(ran)
    said = f"{sum(ran.seconds):.2f} s, {ran.peak_mib:.0f} MiB"
    losses = " ".join(f"{loss:.6f}" for loss in ran.losses)
    sys.stderr.write(f"turn {turn + 1}: {name}: {said}, losses {losses}\n")


def _ratios(runs: dict[str, list[Ran]]) -> dict[str, dict[str, float]]:
    found = {}
    for mine in (name for name in runs if name.startswith("ours")):
        for name in (name for name in _TRL if name in runs):
            ratios = [
                sum(b.seconds) / sum(a.seconds) for a, b in zip(runs[mine], runs[name], strict=True)
            ]
            found[f"{mine} over {name}"] = {
                "median": median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "memory": median(r.peak_mib for r in runs[mine])
                / median(r.peak_mib for r in runs[name]),
            }
    return found


def _shown(report: dict[str, Any]) -> str:
    lines = [
        f"{report['file']}, {report['method']}, {report['dtype']} on {report['device']}: "
        f"{report['step_pairs']} pairs a step, "
        f"{report['n_tokens']:,} tokens with every prompt counted twice, "
        f"{report['n_unique_tokens']:,} once; {report['cores']} cores"
    ]
    for name, runs in report["runs"].items():
        seconds = median(sum(run["seconds"]) for run in runs)
        peak = max(run["peak_mib"] for run in runs)
        lines.append(f"{name:20} {seconds:8.2f} s {peak:8.0f} MiB")
    for name, ratio in report["ratios"].items():
        lines.append(
            f"{name}: {ratio['median']:.2f} times as fast ({ratio['least']:.2f} to "
            f"{ratio['most']:.2f}), at {ratio['memory']:.2f} of its memory"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
