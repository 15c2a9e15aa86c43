"""How long it takes to know that everything is scored: seconds in the process, after imports.

`python -m benchmarks.ledger [PAIRS]` makes a ledger of so many pairs (10,000) in a temporary
folder and runs its scoring stage again, before and after compaction.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.ledger.work import prepare, run_again
from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.scoring.ledger import collect, compact, scorer_directories


def main(n_pairs: int) -> None:
    """Print the times, best of three."""
    with tempfile.TemporaryDirectory() as folder:
        path = prepare(Path(folder) / "desk", n_pairs)
        ledger = store_of(load_plan(path)).ledger
        for what in ("as committed", "compacted"):
            runs = [run_again(path) for _ in range(3)]
            size = sum(p.stat().st_size for p in ledger.rglob("*") if p.is_file()) / (1 << 20)
            print(
                f"{what}: {n_pairs:,} pairs known in {min(r.seconds for r in runs):.2f} s, "
                f"{size:.0f} MiB; torch loaded: {runs[0].loaded_torch}"
            )
            for directory in scorer_directories(ledger):
                compact(directory)
            collect(ledger, remove=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
