"""Scoring speed against TRL and vLLM, in alternating runs; into one JSON file.

    python -m benchmarks.scoring --output scoring.json [--hh FILE]

The torch engine scores pairs against TRL's reference precompute, and vLLM with shared prompts
against vLLM without, on one engine. All get the same token ids, in float32. A part of the pairs
first tells TRL's best settings, with a reference model of its own and with its default. Then every
scorer goes over all pairs, in turns, each in a process that waits while the others work; the torch
engine also with all cores on one tree after another, instead of each on its own. Ratios are of runs
in one turn. On a GPU the memory is the GPU's, of tensors. Distances are to transformers in float64,
per sequence.

Nothing else should run meanwhile.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl

from benchmarks.devices import device_of
from benchmarks.gpu_check.processes import Elsewhere, elsewhere
from benchmarks.scoring.work import (
    Pair,
    Sums,
    Timed,
    TrlSetting,
    float64_sums,
    open_ours,
    open_trl,
    quiet,
    timed,
)
from pipeline.intake import run_intake
from pipeline.models import Checkpoint, load_tokenizer, resolve
from pipeline.plan import ModelConfig, Plan, SourceConfig, TokenizationConfig, VllmConfig
from pipeline.scoring.engines.base import Group, groups_of
from pipeline.store import Store, read
from pipeline.tokenization import Encoder, tokenize_pairs

_PROJECT = Path(__file__).resolve().parents[2]
_SAMPLE = _PROJECT / "sample" / "preferences.jsonl"
_TRL = ("trl, best", "trl, default")
_VLLM = ("vllm, shared prompts", "vllm, plain")
_TOGETHER = "torch, cores together"
_RATIOS = [("torch", "trl, best"), ("torch", "trl, default"), _VLLM, ("torch", _TOGETHER)]


def main() -> None:
    """Run what is asked for and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("scoring.json"))
    parser.add_argument("--store", type=Path, default=_PROJECT / "store" / "scoring")
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--pairs-file", type=Path, default=_SAMPLE, help="conversational pairs")
    parser.add_argument("--hh", type=Path, help="HH transcripts instead, JSON lines or gzipped")
    parser.add_argument("--pairs", type=int, default=64, help="the first usable ones of the file")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scan-pairs", type=int, default=12, help="to find TRL's best settings")
    parser.add_argument(
        "--trl-batches", type=int, nargs="+", help="default: 1 2 4, on a GPU 4 16 64"
    )
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: no GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of vLLM's cache blocks")
    parser.add_argument("--without", nargs="*", default=[], choices=("trl", "vllm", "float64"))
    options = parser.parse_args()
    device, options.there = device_of(options.device)
    options.on_cpu = device == "cpu"
    options.trl_batches = options.trl_batches or ([1, 2, 4] if options.on_cpu else [4, 16, 64])
    checkpoint, pairs, groups = prepare(options)
    report: dict[str, Any] = {
        "model": options.model,
        "file": str((options.hh or options.pairs_file).name),
        "n_pairs": len(pairs),
        "n_tokens": sum(pair.n_tokens for pair in pairs),
        "device": device,
        "dtype": options.dtype,
        "cores": len(os.sched_getaffinity(0)),
    }
    with ExitStack() as stack:
        runs = _race(options, checkpoint, pairs, groups, report, stack)
    exact: Sums = {}
    if "float64" not in options.without:
        exact = elsewhere(options.there, float64_sums, checkpoint, groups)
    report["scorers"] = {
        name: _figures(timings, report["n_tokens"], exact) for name, timings in runs.items()
    }
    report["ratios"] = {
        f"{fast} over {slow}": _ratios(runs[fast], runs[slow])
        for fast, slow in _RATIOS
        if fast in runs and slow in runs
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{_shown(report)}\n{options.output}\n")


def prepare(options: argparse.Namespace) -> tuple[Checkpoint, list[Pair], list[Group]]:
    """The model, and the first usable pairs of the file, as pairs and as groups."""
    store = Store(options.store.resolve(), "scoring")
    config = ModelConfig(checkpoint=options.model)
    checkpoint = resolve(config, store)
    source = SourceConfig(
        path=(options.hh or options.pairs_file).resolve(),
        shape="hh" if options.hh else "conversational",
    )
    with tempfile.TemporaryDirectory() as place:
        data = Store(Path(place), "scoring")
        run_intake(Plan(name="scoring", sources={"s": source}, models={"m": config}), data)
        first = read(data, "pairs").sort("file", "row")
    tables = tokenize_pairs(first, Encoder(load_tokenizer(checkpoint), TokenizationConfig()))
    chosen = (
        first.select("pair_id")
        .join(tables.pair_sequences, on="pair_id", maintain_order="left")
        .head(options.pairs)
    )
    wanted = pl.concat([chosen["chosen_id"], chosen["rejected_id"]])
    sequences = tables.sequences.filter(pl.col("sequence_id").is_in(wanted.to_list()))
    by_id = {row["sequence_id"]: row for row in sequences.iter_rows(named=True)}
    pairs = [
        Pair(
            by_id[row["chosen_id"]]["prompt_ids"],
            by_id[row["chosen_id"]]["completion_ids"],
            by_id[row["rejected_id"]]["completion_ids"],
            row["chosen_id"],
            row["rejected_id"],
        )
        for row in chosen.iter_rows(named=True)
    ]
    return checkpoint, pairs, groups_of(sequences)


def _race(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    pairs: list[Pair],
    groups: list[Group],
    report: dict[str, Any],
    stack: ExitStack,
) -> dict[str, list[Timed]]:
    """Every scorer over all pairs, in turns."""
    entries: dict[str, tuple[Elsewhere, tuple[Any, ...]]] = {}

    def process() -> Elsewhere:
        environment = {"TOKENIZERS_PARALLELISM": "false", **options.there}
        started = stack.enter_context(Elsewhere(environment))
        started.call(quiet)
        return started

    config = ModelConfig(checkpoint=options.model, engine="torch", dtype=options.dtype)
    torch = process()
    report["sharing"] = torch.call(open_ours, config, checkpoint, groups)
    n_cores = report["cores"]
    entries["torch"] = torch, (groups, {"_n_threads": n_cores} if options.on_cpu else {})
    if options.on_cpu:
        entries[_TOGETHER] = torch, (groups, {"_n_threads": 1})  # one tree after another
    if "trl" not in options.without:
        trl = process()
        trl.call(open_trl, checkpoint, options.dtype)
        best = _best_settings(options, trl, pairs, report)
        entries |= {name: (trl, (pairs, best[name])) for name in _TRL}
    if "vllm" not in options.without:
        vllm = process()
        settings = VllmConfig(block_size=options.block_size)
        config = config.model_copy(update={"engine": "vllm", "vllm": settings})
        vllm.call(open_ours, config, checkpoint, groups)
        entries |= {
            name: (vllm, (groups, {"_reuse": reuse}))
            for name, reuse in zip(_VLLM, (True, False), strict=True)
        }
    for where, arguments in entries.values():  # the first pass of a process is slow
        where.call(timed, arguments[0][:2], *arguments[1:])
    runs: dict[str, list[Timed]] = {name: [] for name in entries}
    for turn in range(options.turns):
        for name, (where, arguments) in entries.items():
            runs[name].append(where.call(timed, *arguments))
            sys.stderr.write(f"turn {turn + 1}: {name}: {runs[name][-1].seconds:.2f} s\n")
    return runs


def _best_settings(
    options: argparse.Namespace, trl: Elsewhere, pairs: list[Pair], report: dict[str, Any]
) -> dict[str, TrlSetting]:
    """The fastest of TRL's settings over pairs from all over the lengths, of each kind."""
    by_length = sorted(pairs, key=lambda pair: pair.n_tokens)
    some = by_length[:: max(1, len(pairs) // options.scan_pairs)]
    for separate in (True, False):
        trl.call(timed, some[:1], TrlSetting(separate, True, 1))
    best = {}
    report["trl scan, seconds"] = seconds = {}
    for name, separate in zip(_TRL, (True, False), strict=True):
        scanned = {}
        for sort, batch in product((True, False), options.trl_batches):
            setting = TrlSetting(separate, sort, batch)
            scanned[setting] = seconds[str(setting)] = trl.call(timed, some, setting).seconds
            sys.stderr.write(f"trl scan: {setting}: {scanned[setting]:.2f} s\n")
        best[name] = min(scanned, key=lambda setting: scanned[setting])
    report["trl settings"] = {name: str(setting) for name, setting in best.items()}
    return best


def _figures(timings: list[Timed], n_tokens: int, exact: Sums) -> dict[str, Any]:
    seconds = [timing.seconds for timing in timings]
    far = [abs(timings[0].sums[i] - value) for i, value in exact.items()]
    return {
        "seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": round(n_tokens / median(seconds), 1),
        "largest_distance_to_float64": max(far, default=None),
        "peak_mib": round(max(timing.peak_mib for timing in timings)),
    }


def _ratios(fast: list[Timed], slow: list[Timed]) -> dict[str, float]:
    ratios = [b.seconds / a.seconds for a, b in zip(fast, slow, strict=True)]
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


def _shown(report: dict[str, Any]) -> str:
    """For people: a line per scorer and per ratio."""
    lines = [
        f"{report['file']}: {report['n_pairs']} pairs, {report['n_tokens']:,} tokens with every "
        f"prompt counted twice; {report['dtype']} on {report['device']}, {report['cores']} cores",
        f"{'':22} {'median s':>9} {'tokens/s':>9} {'to float64':>11} {'peak MiB':>9}",
    ]
    for name, figures in report["scorers"].items():
        far = figures["largest_distance_to_float64"]
        lines.append(
            f"{name:22} {median(figures['seconds']):9.2f} {figures['tokens_per_second']:9.0f} "
            f"{'' if far is None else f'{far:.1e}':>11} {figures['peak_mib']:9}"
        )
    for name, ratio in report["ratios"].items():
        lines.append(f"{name}: {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})")
    for name, setting in report.get("trl settings", {}).items():
        lines.append(f"{name}: {setting}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
