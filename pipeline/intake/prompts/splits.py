"""Which prompts are trained on."""

import polars as pl

from pipeline.ids import unit_interval
from pipeline.plan import SplitConfig


def split_of(prompt_id: str, split: SplitConfig) -> str:
    """`train` or `test`, by the prompt's id alone: no row ever moves when others come or go."""
    return "test" if unit_interval(prompt_id, split.salt) < split.test_share else "train"


def splits_of(units: pl.DataFrame, split: SplitConfig) -> pl.DataFrame:
    """The split of every prompt: `prompt_id, split`.

    A prompt that occurs in an evaluation source is never trained on, wherever else it occurs.
    """
    prompts = units.group_by("prompt_id", maintain_order=True).agg(pl.col("evaluation").any())
    found = [
        "evaluation" if evaluated else split_of(prompt_id, split)
        for prompt_id, evaluated in prompts.iter_rows()
    ]
    return prompts.select("prompt_id", split=pl.Series(found, dtype=pl.String))


def prompts_in_two_splits(*tables: pl.DataFrame) -> int:
    """How many prompts stand in more than one split: 0, or training has seen the test.

    Args:
        tables: with `prompt_id` and `split`, e.g. `pairs` and `labels`.
    """
    both = pl.concat([table.select("prompt_id", "split") for table in tables])
    per_prompt = both.group_by("prompt_id").agg(pl.col("split").n_unique())
    return per_prompt.filter(pl.col("split") > 1).height
