"""From the plan's sources to the tables of the intake, in memory that does not grow with them.

Rows are read in chunks, and the units that keep the contract are written to disk cut by prompt;
then the units of some prompts at a time are judged together and merged; then the tables are
published piece by piece. Ids and disposition of a row stay in memory, some 40 bytes a row.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.errors import SourceError, StoreError
from pipeline.intake.confounds import confound_table, count_confounds
from pipeline.intake.law import (
    PLACE_SCHEMA,
    count_fates,
    quarantined,
    row_fates,
    row_law,
    row_states,
)
from pipeline.intake.parallel import FEW, in_order
from pipeline.intake.prompts.judging import Bucket, JudgedBucket, judge_bucket, read_merged
from pipeline.intake.prompts.leakage import PromptTask, search
from pipeline.intake.prompts.merge import FATE_SCHEMA, Setting
from pipeline.intake.prompts.splits import prompts_in_two_splits
from pipeline.intake.rows.contract import REJECTED_SCHEMA
from pipeline.intake.rows.reading import Chunk, ReadChunk, read_chunk
from pipeline.intake.rows.units import LABEL, PAIR
from pipeline.intake.sources import raw_rows, shape_of_source
from pipeline.intake.spool import BUCKETS, read_parts
from pipeline.plan import Plan
from pipeline.rules import INTAKE, rule_table
from pipeline.sources import RawRow
from pipeline.store import Store, TableSnapshot, publish, publish_pieces
from schemas import (
    Confound,
    InputRow,
    PreferenceLabel,
    PreferencePair,
    QuarantinedRow,
    RuleCount,
    polars_schema,
)

_CHUNK_ROWS = 10_000
_CHUNK_BYTES = 32 << 20
_EXAMPLES = 5


@dataclass(frozen=True)
class IntakeResult:
    """The published tables, the law's verdict (a row per source), and what was counted.

    `examples` are the first five quarantined rows of every rule; `trained_near_eval` training
    pairs whose prompt is near a held-out or evaluation prompt.
    """

    pairs: TableSnapshot
    labels: TableSnapshot
    rows: TableSnapshot
    quarantine: TableSnapshot
    rule_counts: TableSnapshot
    confounds: pl.DataFrame
    law: pl.DataFrame
    rules: pl.DataFrame
    examples: pl.DataFrame
    quarantined_by_rule: dict[str, int]
    pairs_by_split: dict[str, int]
    flags: dict[str, int]
    prompts_in_two_splits: int
    trained_near_eval: int


@dataclass
class _Counts:
    """What is counted while tables are published."""

    fates: Counter[tuple[str, str]]
    splits: Counter[str]
    confounds: Counter[tuple[str, str]]
    votes: int = 0
    in_two_splits: int = 0
    trained_near_eval: int = 0


def run_intake(plan: Plan, store: Store) -> IntakeResult:
    """Read every source, quarantine what breaks a rule, merge, split, and publish the tables.

    Raises:
        SourceError: a source cannot be read at all, or no valid pair or label is left (the
            quarantine is published all the same).
        StoreError: the disk is full or failed.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".intake-", dir=store.root) as spool:
            return _run(plan, store, Path(spool))
    except OSError as error:
        raise StoreError(f"{store.root}: cannot be written: {error.strerror or error}") from error


def _run(plan: Plan, store: Store, spool: Path) -> IntakeResult:
    read, n_read = _read(plan, spool)
    setting = _setting(plan, read, spool)
    judged = list(in_order(judge_bucket, _buckets(read, setting, spool)))
    nothing = pl.DataFrame(schema=FATE_SCHEMA)
    states = row_states(pl.concat([nothing, *(bucket.fates for bucket in judged)]))
    rejected = pl.concat(
        [
            pl.DataFrame(schema=REJECTED_SCHEMA),
            *(chunk.rejected for chunk in read),
            *(bucket.rejected for bucket in judged),
        ]
    ).sort("ordinal", "unit")

    counts = _Counts(Counter(), Counter(), Counter())
    examples = _Examples()
    pairs = publish_pieces(store, "pairs", _pairs(judged, spool, counts), PreferencePair)
    labels = publish_pieces(store, "labels", _labels(judged, spool, counts), PreferenceLabel)
    rows = publish_pieces(store, "rows", _rows(read, states, spool, counts), InputRow)
    quarantine = publish_pieces(
        store, "quarantine", _quarantine(read, rejected, spool, examples), QuarantinedRow
    )
    flags = sum((bucket.flags for bucket in judged), Counter())
    by_rule = Counter(rejected["rule"].to_list())
    by_rule["duplicate"] = sum(n for (_, fate), n in counts.fates.items() if fate == "merged")
    by_rule["byte_order_mark"] = sum(chunk.n_byte_order_marks for chunk in read)
    rules = rule_table(INTAKE, by_rule + flags, sum(n_read.values()), plan.actions, plan.limits)
    confounds = confound_table(counts.confounds)
    publish(store, "confounds", confounds, Confound)
    result = IntakeResult(
        pairs=pairs,
        labels=labels,
        rows=rows,
        quarantine=quarantine,
        rule_counts=publish(store, "rule_counts/intake", rules, RuleCount),
        confounds=confounds,
        law=row_law(counts.fates, n_read, counts.votes),
        rules=rules,
        examples=examples.frame(),
        quarantined_by_rule=dict(sorted(Counter(rejected["rule"].to_list()).items())),
        pairs_by_split=dict(sorted(counts.splits.items())),
        flags=dict(sorted(flags.items())),
        prompts_in_two_splits=counts.in_two_splits,
        trained_near_eval=counts.trained_near_eval,
    )
    if not pairs.n_rows and not labels.n_rows:
        raise SourceError(
            f"no valid pair in {', '.join(n_read)}: {sum(n_read.values())} rows read, "
            f"quarantined by rule: {result.quarantined_by_rule}; see {quarantine.path}"
        )
    return result


def _read(plan: Plan, spool: Path) -> tuple[list[ReadChunk], dict[str, int]]:
    """Read all sources; the chunks in order, and the rows of each source as they were cut."""
    n_read: dict[str, int] = {}
    return list(in_order(read_chunk, _chunks(plan, spool, n_read))), n_read


def _chunks(plan: Plan, spool: Path, n_read: dict[str, int]) -> Iterator[Chunk]:
    acts = plan.actions
    number = first = 0
    sources = [(name, config, False) for name, config in plan.sources.items()]
    sources += [(name, config, True) for name, config in plan.evaluation.items()]
    for name, config, evaluation in sources:
        n_read[name] = 0
        shape = shape_of_source(name, config)
        for rows in _cut(raw_rows(name, config)):
            n_read[name] += len(rows)
            yield Chunk(
                number,
                first,
                name,
                rows,
                shape,
                config.options,
                evaluation,
                acts,
                _units(spool, number),
                _places(spool, number),
            )
            number, first = number + 1, first + len(rows)


def _cut(rows: Iterator[tuple[str, RawRow]]) -> Iterator[list[tuple[str, RawRow]]]:
    """Rows in lists of at most so many rows, or about so many bytes."""
    chunk: list[tuple[str, RawRow]] = []
    n_bytes = 0
    for file, row in rows:
        chunk.append((file, row))
        n_bytes += len(row.data)
        if len(chunk) == _CHUNK_ROWS or n_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, n_bytes = [], 0
    if chunk:
        yield chunk


def _setting(plan: Plan, read: list[ReadChunk], spool: Path) -> Setting:
    acts = plan.actions
    tasks = [
        PromptTask(units, plan.split, spool / f"prompts-{number:06d}.arrow")
        for number, units in _together(read, spool)
    ]
    seen = search(
        tasks,
        near=acts["near_eval"] != "off" and bool(plan.evaluation or plan.split.test_share),
        grams=acts["contaminated"] != "off" and bool(plan.evaluation),
    )
    sources = {**plan.sources, **plan.evaluation}
    options = {name: config.options for name, config in sources.items()}
    return Setting(plan.split, acts, options, seen.near, seen.grams)


def _buckets(read: list[ReadChunk], setting: Setting, spool: Path) -> Iterator[Bucket]:
    for number, units in _together(read, spool):
        yield Bucket(number, units, setting, _result(spool, number))


def _together(read: list[ReadChunk], spool: Path) -> Iterator[tuple[int, list[tuple[Path, int]]]]:
    """What is judged together: a number, and the files and record batches of one bucket each.

    Of a few chunks all buckets go together, which is faster; the result is the same.
    """
    n = BUCKETS if len(read) <= FEW else 1
    for first in range(0, BUCKETS, n):
        found = [
            (_units(spool, chunk.number), batch)
            for chunk in read
            for bucket in range(first, first + n)
            if (batch := chunk.batches.get(bucket)) is not None
        ]
        if found:
            yield first, found


def _pairs(judged: list[JudgedBucket], spool: Path, counts: _Counts) -> Iterator[pl.DataFrame]:
    for bucket in judged:
        path = _result(spool, bucket.number)
        pairs, labels = (read_merged(bucket, path, kind) for kind in (PAIR, LABEL))
        counts.in_two_splits += prompts_in_two_splits(pairs, labels)
        for table in (pairs, labels):
            trained = (pl.col("split") == "train") & pl.col("flags").list.contains("near_eval")
            counts.trained_near_eval += table.filter(trained).height
        counts.splits.update(pairs["split"].to_list())
        counts.votes += int(pairs["votes"].sum())
        counts.confounds += count_confounds(pairs)
        yield pairs


def _labels(judged: list[JudgedBucket], spool: Path, counts: _Counts) -> Iterator[pl.DataFrame]:
    for bucket in judged:
        labels = read_merged(bucket, _result(spool, bucket.number), LABEL)
        counts.votes += int(labels["votes"].sum())
        yield labels


def _rows(
    read: list[ReadChunk], states: pl.DataFrame, spool: Path, counts: _Counts
) -> Iterator[pl.DataFrame]:
    schema = pl.Schema({name: dtype for name, dtype in PLACE_SCHEMA.items() if name != "raw"})
    for chunk, first in _with_first(read):
        places = read_parts([(_places(spool, chunk.number), 0)], schema)
        rows = row_fates(places, _between(states, first, chunk.n_rows))
        counts.fates += count_fates(rows)
        yield rows


def _quarantine(
    read: list[ReadChunk], rejected: pl.DataFrame, spool: Path, examples: "_Examples"
) -> Iterator[pl.DataFrame]:
    for chunk, first in _with_first(read):
        found = _between(rejected, first, chunk.n_rows)
        if found.is_empty():
            continue
        piece = quarantined(read_parts([(_places(spool, chunk.number), 0)], PLACE_SCHEMA), found)
        examples.see(piece)
        yield piece


def _with_first(read: list[ReadChunk]) -> Iterator[tuple[ReadChunk, int]]:
    """Each chunk, and the ordinal of its first row."""
    first = 0
    for chunk in read:
        yield chunk, first
        first += chunk.n_rows


def _between(frame: pl.DataFrame, first: int, n_rows: int) -> pl.DataFrame:
    """The rows of a frame, sorted by ordinal, that are about `n_rows` rows from `first` on."""
    ordinals = frame["ordinal"]
    start = ordinals.search_sorted(first, side="left")
    end = ordinals.search_sorted(first + n_rows, side="left")
    return frame[start:end]


class _Examples:
    """The first quarantined rows of every rule."""

    def __init__(self) -> None:
        self._seen: list[pl.DataFrame] = []

    def see(self, piece: pl.DataFrame) -> None:
        self._seen.append(piece)
        self._seen = [self.frame()]

    def frame(self) -> pl.DataFrame:
        if not self._seen:
            return pl.DataFrame(schema=polars_schema(QuarantinedRow))
        together = pl.concat(self._seen)
        return (
            together.group_by("rule", maintain_order=True).head(_EXAMPLES).select(together.columns)
        )


def _units(spool: Path, number: int) -> Path:
    return spool / f"units-{number:06d}.arrow"


def _places(spool: Path, number: int) -> Path:
    return spool / f"places-{number:06d}.arrow"


def _result(spool: Path, number: int) -> Path:
    return spool / f"merged-{number:06d}.arrow"
