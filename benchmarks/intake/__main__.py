"""Time and memory of the intake over many rows, and whether it finds just the garbage.

python -m benchmarks.intake            # 250,000 and 1,000,000 rows
python -m benchmarks.intake --rows 20000

Every figure is of processes of their own, so that what one phase keeps in memory is not counted
for another. Memory is the largest sum of the proportional set sizes of all processes.
"""

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.intake.work import child, compared, intake, write

_WITHOUT = {"near_eval": "off"}
"""Near-duplicate search is timed apart."""


def main() -> int:
    """Run it; 0 if the quarantine is exactly the garbage at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--rows-in", type=Path, help="keeps the files there, and takes them again")
    parser.add_argument("--output", type=Path, default=Path("intake.json"))
    parser.add_argument("--near", action="store_true", help="also with near-duplicate search")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = options.rows_in or Path(folder)
        for n in options.rows:
            if not _truth(kept, n).exists():
                child(write, _rows(kept, n), _truth(kept, n), n)
        results = [_measured(kept, Path(folder), n, options.near) for n in options.rows]
    for smaller, larger in pairwise(results):
        grown = larger["peak_bytes"] - smaller["peak_bytes"]
        larger["bytes_per_row"] = grown / (larger["rows"] - smaller["rows"])
        _say(f"growth from {smaller['rows']:,} to {larger['rows']:,} rows: "
              f"{larger['bytes_per_row']:.0f} bytes a row")  # fmt: skip
    options.output.write_text(json.dumps(results, indent=2))
    return 0 if all(result["exact"] for result in results) else 1


def _rows(folder: Path, n: int) -> Path:
    return folder / f"rows_{n}.jsonl"


def _truth(folder: Path, n: int) -> Path:
    return folder / f"truth_{n}.jsonl"


def _measured(rows: Path, folder: Path, n: int, near: bool) -> dict[str, Any]:
    source, truth = _rows(rows, n), _truth(rows, n)
    seconds, peak = child(intake, source, folder / f"store_{n}", _WITHOUT)
    result: dict[str, Any] = {"rows": n, "file_bytes": source.stat().st_size,
                              "seconds": seconds, "peak_bytes": peak}  # fmt: skip
    result |= compared(folder / f"store_{n}", truth)
    _say(f"{n:,} rows, {result['file_bytes'] / 1e6:.0f} MB: {seconds:.1f} s, "
          f"peak {peak / 1e9:.2f} GB; {result['quarantined']:,} quarantined, of "
          f"{result['garbage']:,} garbage; missed {result['missed']}, wrong rule "
          f"{result['wrong_rule']}, valid ones rejected {result['wrongly_rejected']}")  # fmt: skip
    if near:
        seconds, peak = child(intake, source, folder / f"near_{n}", {})
        result |= {"near_seconds": seconds, "near_peak_bytes": peak}
        _say(f"  with near-duplicate search {seconds:.1f} s, peak {peak / 1e9:.2f} GB")
    return result


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
