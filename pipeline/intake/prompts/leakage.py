"""What of an evaluation the training prompts have seen, over all buckets of units."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.intake.parallel import in_order
from pipeline.intake.prompts.near import BANDS, NearIndex, band_keys, spoken, word_grams
from pipeline.intake.prompts.splits import splits_of
from pipeline.intake.rows.units import UNIT_SCHEMA
from pipeline.intake.spool import read_parts, write_parts
from pipeline.plan import SplitConfig

_COLUMNS = ["prompt_id", "prompt", "evaluation"]
_KEYS = pl.Array(pl.UInt64, BANDS)
_NOBODY = pl.DataFrame(
    schema={"prompt_id": pl.String, "split": pl.String, "text": pl.String, "keys": _KEYS}
)


@dataclass(frozen=True)
class PromptTask:
    """The prompts of one bucket: where its units are, and where its prompts go."""

    units: list[tuple[Path, int]]
    split: SplitConfig
    prompts: Path


@dataclass(frozen=True)
class Seen:
    """What training prompts may have seen.

    Attributes:
        near: ids of training prompts that are near a held-out or evaluation prompt.
        grams: hashes of the runs of words in evaluation prompts, uint64, sorted.
    """

    near: frozenset[str]
    grams: np.ndarray


def search(tasks: Iterable[PromptTask], *, near: bool, grams: bool) -> Seen:
    """Look through all prompts for what is asked for."""
    found: set[str] = set()
    runs = np.empty(0, np.uint64)
    if near or grams:
        files = list(in_order(_key_prompts, tasks))
        if near:
            held = pl.concat([_NOBODY, *(_prompts(path, {"test", "evaluation"}) for path in files)])
            index = NearIndex(held["text"], _keys(held))
            for path in files:
                part = _prompts(path, {"train"})
                close = index.near(part["text"], _keys(part))
                found |= set(part["prompt_id"].filter(pl.Series(close, dtype=pl.Boolean)))
        if grams:
            texts = [text for path in files for text in _prompts(path, {"evaluation"})["text"]]
            runs = np.unique(np.concatenate([runs, *map(word_grams, texts)]))
    return Seen(frozenset(found), runs)


def _key_prompts(task: PromptTask) -> Path:
    """Write a bucket's distinct prompts: `prompt_id, split, text, keys`."""
    schema = pl.Schema({name: UNIT_SCHEMA[name] for name in _COLUMNS})
    units = read_parts(task.units, schema)
    prompts = units.group_by("prompt_id", maintain_order=True).agg(pl.col("prompt").first())
    prompts = prompts.join(splits_of(units, task.split), on="prompt_id", maintain_order="left")
    prompts = prompts.select("prompt_id", "split", text=spoken(pl.col("prompt")))
    keys = pl.Series("keys", band_keys(prompts["text"]), dtype=_KEYS)
    write_parts(task.prompts, prompts.with_columns(keys, part=pl.lit(0)), "part")
    return task.prompts


def _prompts(path: Path, splits: set[str]) -> pl.DataFrame:
    return read_parts([(path, 0)], _NOBODY.schema).filter(pl.col("split").is_in(splits))


def _keys(prompts: pl.DataFrame) -> np.ndarray:
    return prompts["keys"].to_numpy().reshape(-1, BANDS).astype(np.uint64)
