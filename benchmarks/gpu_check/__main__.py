"""Check vLLM scoring on this machine's GPU and write what was measured as JSON."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.gpu_check.lab import Lab, prepare
from benchmarks.gpu_check.parts import PARTS, Figures, NotRun
from pipeline.errors import LogratioError
from pipeline.scoring.engines.torch_engine import found_device_class

_SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "preferences.jsonl"


def main(arguments: list[str] | None = None) -> int:
    """0 if every part that ran passed, 1 if one did not, 2 if nothing could be measured."""
    options = _parser().parse_args(arguments)
    on_cuda = found_device_class().startswith("cuda")
    if not on_cuda and not options.allow_cpu:
        sys.stderr.write(
            "gpu-check: torch finds no CUDA device; --allow-cpu runs what a CPU can.\n"
        )
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as root:
            lab = prepare(
                Path(root),
                options.store,
                options.model,
                options.pairs,
                options.limit,
                list(dict.fromkeys(options.dtype)),
                on_cuda,
            )
            return check(lab, options)
    except LogratioError as error:
        sys.stderr.write(f"gpu-check: {error}\n")
        return 2


def check(lab: Lab, options: argparse.Namespace) -> int:
    """Run every part; the file is written after each, so that what is measured stays."""
    started = monotonic()
    report: dict[str, Any] = {
        "model": options.model,
        "pairs": options.pairs.name,
        "dtypes": lab.dtypes,
        "n_sequences": lab.sequences.height,
        "n_tokens": lab.n_tokens,
        "n_scored": lab.n_scored,
        "parts": {},
    }
    for name, part in PARTS.items():
        sys.stderr.write(f"gpu-check: {name}\n")
        report["parts"][name] = run_part(part, lab)
        entries = report["parts"].values()
        report["passed"] = all(entry["passed"] for entry in entries if entry["ran"])
        report["seconds"] = round(monotonic() - started, 1)
        options.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{summary(report)}\n{options.output}\n")
    return 0 if report["passed"] else 1


def run_part(part: Callable[[Lab], Figures], lab: Lab) -> Figures:
    """A part's entry; what it raises is its result, and the others run all the same."""
    started = monotonic()
    try:
        entry = {"ran": True, **part(lab)}
    except NotRun as reason:
        entry = {"ran": False, "passed": None, "why_not": str(reason)}
    except Exception as error:
        entry = {"ran": True, "passed": False, "error": f"{type(error).__name__}: {error}"}
    return {**entry, "took_seconds": round(monotonic() - started, 1)}


def summary(report: dict[str, Any]) -> str:
    """The report for people: a line per part."""
    lines = [
        f"{report['model']}: {report['n_sequences']} sequences, {report['n_tokens']:,} tokens, "
        f"{report['n_scored']:,} scored; differences are the largest, in nats"
    ]
    for name, entry in report["parts"].items():
        verdict = "not run" if not entry["ran"] else "passed" if entry["passed"] else "FAILED"
        said = entry.get("why_not") or entry.get("error") or entry["summary"]
        lines.append(f"{name:16} {verdict:8} {entry['took_seconds']:5.0f} s  {said}")
    verdict = "passed" if report["passed"] else "FAILED"
    lines.append(f"{'all that ran':16} {verdict:8} {report['seconds']:5.0f} s")
    return "\n".join(lines)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=f"{__doc__} The tests that need a GPU are others: pytest -m gpu.",
    )
    parser.add_argument(
        "--model",
        default="packaged:smollm2-135m-instruct",
        help="a directory, a hub id, or packaged:smollm2-135m-instruct (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs", type=Path, default=_SAMPLE, help="conversational pairs as JSON lines"
    )
    parser.add_argument(
        "--limit", type=_positive, help="at most this many pairs, always the same ones"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("bfloat16", "float32", "float16"),
        default=["bfloat16", "float32"],
        help="what is measured; the first is what is timed (default: bfloat16 float32)",
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("store"),
        help="where a packaged model is written out (default: %(default)s); nothing else is kept",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_check.json"), help="default: %(default)s"
    )
    parser.add_argument(
        "--allow-cpu", action="store_true", help="without a CUDA device, run what a CPU can"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
