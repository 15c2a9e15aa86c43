"""All units of some prompts, from units on disk to pairs and labels; a process's second work."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.intake.prompts.merge import Setting, fates, judge, merge
from pipeline.intake.rows.reading import SPOOLED_SCHEMA
from pipeline.intake.rows.units import LABEL, PAIR
from pipeline.intake.spool import read_parts, write_parts
from schemas import PreferenceLabel, PreferencePair, polars_schema


@dataclass(frozen=True)
class Bucket:
    """Prompts that are judged together: where their units are, and where the result goes."""

    number: int
    units: list[tuple[Path, int]]
    setting: Setting
    result: Path


@dataclass(frozen=True)
class JudgedBucket:
    """What a bucket gave: fates of rows, rejections, and flags counted by unit.

    Pairs and labels are parts `PAIR` and `LABEL` of the file, by the record batch they are.
    """

    number: int
    batches: dict[int, int]
    fates: pl.DataFrame
    rejected: pl.DataFrame
    flags: Counter[str]


def judge_bucket(bucket: Bucket) -> JudgedBucket:
    """Apply the rules over whole prompts to a bucket, merge what is left, and write it."""
    units, rejected = judge(read_parts(bucket.units, SPOOLED_SCHEMA), bucket.setting)
    merged = merge(units)
    return JudgedBucket(
        bucket.number,
        write_parts(bucket.result, merged, "kind"),
        fates(units),
        rejected,
        Counter(units["flags"].explode().drop_nulls().to_list()),
    )


def read_merged(bucket: JudgedBucket, path: Path, kind: int) -> pl.DataFrame:
    """A bucket's pairs (`schemas.PreferencePair`) or labels (`schemas.PreferenceLabel`)."""
    model = {PAIR: PreferencePair, LABEL: PreferenceLabel}[kind]
    if kind not in bucket.batches:
        return pl.DataFrame(schema=polars_schema(model))
    names = {PAIR: {"unit_id": "pair_id"}, LABEL: {"unit_id": "label_id", "chosen": "completion"}}
    found = read_parts([(path, bucket.batches[kind])], None).rename(names[kind])
    return found.select(list(polars_schema(model))).cast(polars_schema(model))
