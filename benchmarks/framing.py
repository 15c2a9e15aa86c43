"""How long it takes to cut files into rows, and to parse rows strictly: microseconds a row.

`python -m benchmarks.framing` writes 1 KB rows in every format to a temporary folder.
"""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import polars as pl
from backports import zstd

from pipeline.sources import frame_rows, parse_object

N_ROWS = 100_000


def _row(i: int) -> dict[str, Any]:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return {
        "prompt": turn("user", f'Question {i}: what does "it" mean — and why?\n' * 7),
        "chosen": turn("assistant", f"It means {i}, as far as anybody can tell.\n" * 6),
        "rejected": turn("assistant", f"Nobody knows what {i} is about. " * 7),
        "score": i / 7,
    }


def _best(run: Callable[[], object], n: int, repeats: int = 3) -> float:
    """Microseconds of processor time for each of n, the least of some runs."""
    times = []
    for _ in range(repeats):
        started = process_time()
        run()
        times.append(process_time() - started)
    return min(times) / n * 1e6


def main() -> None:
    """Measure, and print a line for each."""
    rows = [_row(i) for i in range(N_ROWS)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    frame = pl.DataFrame(rows)
    text = b"\n".join(lines)
    flat = pl.DataFrame(
        {
            name: [row[name][0]["content"] for row in rows]
            for name in ("prompt", "chosen", "rejected")
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "rows.jsonl").write_bytes(text)
        (root / "rows.jsonl.gz").write_bytes(gzip.compress(text, 6))
        (root / "rows.jsonl.zst").write_bytes(zstd.compress(text))
        (root / "rows.json").write_bytes(b"[" + b",\n".join(lines) + b"]")
        flat.write_csv(root / "rows.csv")
        frame.write_parquet(root / "rows.parquet")
        frame.write_ipc_stream(root / "rows.arrow")
        print(f"{len(text) // N_ROWS} bytes a row")
        for path in sorted(root.iterdir()):

            def read(path: Path = path) -> None:
                assert sum(1 for _ in frame_rows(path)) == N_ROWS

            print(f"{path.name:15} {_best(read, N_ROWS):6.2f} us a row")
    few = lines[:20_000]
    for name, sample in {
        "as UTF-8": few,
        "as ASCII escapes": [json.dumps(row).encode() for row in rows[:20_000]],
    }.items():

        def parse(sample: list[bytes] = sample) -> None:
            for line in sample:
                parse_object(line)

        def plain(sample: list[bytes] = sample) -> None:
            for line in sample:
                json.loads(line)

        strict, loose = _best(parse, len(sample)), _best(plain, len(sample))
        print(f"strict parse, {name}: {strict:.2f} us a row; json.loads {loose:.2f}")


if __name__ == "__main__":
    main()
