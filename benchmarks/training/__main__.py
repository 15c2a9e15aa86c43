"""Training speed against TRL: optimiser steps of full fine-tuning, in alternating runs.

    python -m benchmarks.training --output training.json [--hh FILE]

The pairs are the first usable ones of the file, in its order, 4 to an optimiser step; references
are given to both. TRL runs at its best setting (on a CPU a pair at a time with accumulation; what
it computes for its metrics alone left out) and with a step's pairs at once, as it is. Every run is
a process of its own, so that what it keeps resident is its own; its first step, on the shortest
pairs, is not counted. The steps are made again and again, in passes: what a process had not yet of
memory, which can be slow to get, is in the first. Ratios are of runs in one turn, pass by pass. On
a GPU the memory is the GPU's, of tensors.

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
    parser.add_argument("--passes", type=int, default=2, help="over the same pairs, in one run")
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
    checkpoint, (shortest, *counted) = elsewhere(there, prepared, options)
    batches = [shortest, *counted * options.passes]
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
            _keep(runs, turn, name, ran, options.steps)
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
                _keep(runs, turn, name, ran, options.steps)
    report = {
        "model": options.model,
        "method": options.method,
        "device": device,
        "dtype": options.dtype,
        "step_pairs": options.step_pairs,
        "file": (options.hh or options.pairs_file).name,
        "n_tokens": sum(e.n_tokens for batch in counted for e in batch),
        "n_unique_tokens": sum(_unique(e) for batch in counted for e in batch),
        "cores": len(os.sched_getaffinity(0)),
        "runs": {name: [vars(ran) for ran in ran_of] for name, ran_of in runs.items()},
        "steps": options.steps,
        "ratios": [_ratios(runs, i, options.steps) for i in range(options.passes)],
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{_shown(report)}\n{options.output}\n")


def _unique(example: Example) -> int:
    return len(example.prompt_ids) + sum(len(reply.ids) for reply in example.replies)


def _keep(runs: dict[str, list[Ran]], turn: int, name: str, ran: Ran, steps: int) -> None:
    runs.setdefault(name, []).append(ran)
    said = ", ".join(f"{seconds:.2f} s" for seconds in _by_pass(ran.seconds, steps))
    losses = " ".join(f"{loss:.6f}" for loss in ran.losses)
    sys.stderr.write(f"turn {turn + 1}: {name}: {said}, {ran.peak_mib:.0f} MiB, losses {losses}\n")


def _by_pass(seconds: list[float], steps: int) -> list[float]:
    return [sum(seconds[i : i + steps]) for i in range(0, len(seconds), steps)]


def _ratios(runs: dict[str, list[Ran]], which_pass: int, steps: int) -> dict[str, dict[str, float]]:
    found = {}
    for mine in (name for name in runs if name.startswith("ours")):
        for name in (name for name in _TRL if name in runs):
            ratios = [
                _by_pass(b.seconds, steps)[which_pass] / _by_pass(a.seconds, steps)[which_pass]
                for a, b in zip(runs[mine], runs[name], strict=True)
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
        passes = [_by_pass(run["seconds"], report["steps"]) for run in runs]
        seconds = " ".join(f"{median(of_pass):8.2f}" for of_pass in zip(*passes, strict=True))
        peak = max(run["peak_mib"] for run in runs)
        lines.append(f"{name:20} {seconds} s {peak:8.0f} MiB")
    for i, ratios in enumerate(report["ratios"]):
        for name, ratio in ratios.items():
            lines.append(
                f"pass {i + 1}: {name}: {ratio['median']:.2f} times as fast "
                f"({ratio['least']:.2f} to {ratio['most']:.2f}), at {ratio['memory']:.2f} of its "
                "memory"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
