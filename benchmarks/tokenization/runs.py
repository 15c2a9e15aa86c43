"""One preparation of the data, ours or TRL's, in a process of its own."""

import gc
import json
import resource
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import polars as pl

from benchmarks.tokenization.data import as_pairs, conversations

WAYS = ("ours", "trl_1", "trl_2")


def ours(rows: list[dict[str, Any]], tokenizer: Any) -> tuple[dict[str, float], int]:
    """To the published tables `sequences` and `pair_sequences`: the time and tokens."""
    from pipeline.plan import TokenizationConfig
    from pipeline.store import Store, publish, publish_pieces
    from pipeline.tokenization import Encoder, pair_ways, sorted_rows
    from schemas import PairSequence, Sequence, polars_schema

    frame = pl.DataFrame(as_pairs(rows))
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory), "benchmark")
        clock = _Clock()
        encoder = Encoder(tokenizer, TokenizationConfig())
        with sorted_rows(polars_schema(Sequence), store.directory) as sequences:
            ways = pair_ways(frame.iter_slices(1 << 13), encoder, sequences.add)
            publish(store, "pair_sequences", ways.ways, PairSequence)
            found = publish_pieces(store, "sequences", sequences.pieces(), Sequence)
        del encoder
        spent = clock.spent()
        table = pl.read_parquet(found.path)
    if ways.ways.height != len(rows):
        raise RuntimeError(f"{len(rows) - ways.ways.height} pairs were not tokenised")
    lengths = table.select("sequence_id", n=pl.col("n_prompt") + pl.col("n_scored"))
    sides = pl.concat([ways.ways[side] for side in ("chosen_id", "rejected_id")])
    joined = pl.DataFrame({"sequence_id": sides}).join(lengths, on="sequence_id")
    return spent, int(joined["n"].sum())


def trl(
    rows: list[dict[str, Any]], tokenizer: Any, n_processes: int | None
) -> tuple[dict[str, float], int]:
    """To the data set `DPOTrainer` trains on, in memory: the time and tokens."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl.trainer.dpo_trainer import DPOTrainer

    disable_progress_bar()
    data = Dataset.from_list(rows)
    args: Any = SimpleNamespace(
        dataset_num_proc=n_processes, max_length=2048, truncation_mode="keep_start"
    )
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    clock = _Clock()
    found = DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
    spent = clock.spent()
    ids = found.with_format("numpy")
    n_prompt, *n_replies = (
        sum(map(len, ids[column])) for column in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return spent, 2 * n_prompt + sum(n_replies)


def main(way: str, n: int, path: str) -> dict[str, Any]:
    """Prepare, and say how long it took, by the clock and by the cores."""
    from transformers import AutoTokenizer

    rows = conversations(n)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if way == "ours":
        spent, n_tokens = ours(rows, tokenizer)
    else:
        spent, n_tokens = trl(rows, tokenizer, 2 if way == "trl_2" else None)
    return {"way": way, "n": n, "tokens": n_tokens, **spent}


class _Clock:
    """Seconds by the clock, and of all cores in this process and those that have ended."""

    def __init__(self) -> None:
        self._began = perf_counter(), self._cpu()

    def spent(self) -> dict[str, float]:
        seconds = perf_counter() - self._began[0]
        gc.collect()  # ends the renderer's process
        return {"seconds": seconds, "cpu": self._cpu() - self._began[1]}

    def _cpu(self) -> float:
        spent = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in spent)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
