"""From the plan's sources to the tables `pairs`, `rows` and `quarantine`."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.errors import SourceError
from pipeline.ids import content_id
from pipeline.intake.validate import (
    CANDIDATE_SCHEMA,
    apply_contract,
    merge_pairs,
    row_fates,
    row_law,
)
from pipeline.plan import Plan, SourceConfig
from pipeline.sources import (
    READERS,
    SUFFIXES,
    RawRow,
    ReadOptions,
    RowError,
    Unit,
    frame_rows,
    parse_object,
)
from pipeline.store import Store, TableSnapshot, file_digest, publish
from schemas import InputRow, PreferencePair, QuarantinedRow, polars_schema

RAW_CAP = 2000
"""Characters of a rejected row that are kept."""

_CHUNK_ROWS = 10_000
_READ_SCHEMA = {k: v for k, v in polars_schema(InputRow).items() if k in
                ("source", "file", "row", "byte_offset")}  # fmt: skip


@dataclass(frozen=True)
class IntakeResult:
    """The three published tables and the law's verdict, one row per source."""

    pairs: TableSnapshot
    rows: TableSnapshot
    quarantine: TableSnapshot
    law: pl.DataFrame
    quarantined_by_rule: dict[str, int]
    pairs_by_split: dict[str, int]
    flags: dict[str, int]


def run_intake(plan: Plan, store: Store) -> IntakeResult:
    """Read every source, quarantine what breaks a rule, merge, split, and publish three tables.

    Raises:
        SourceError: a source cannot be read at all, or no valid pair is left (the quarantine
            is published all the same).
    """
    read, accepted, quarantined = [], [], []
    n_read: Counter[str] = Counter()
    sources = [(name, config, False) for name, config in plan.sources.items()]
    sources += [(name, config, True) for name, config in plan.evaluation.items()]
    for name, config, evaluation in sources:
        n_read[name] = 0
        for chunk in _chunks(name, config):
            n_read[name] += len(chunk)
            rows, units, broken = _read_chunk(name, config, chunk, evaluation)
            kept, rejected = apply_contract(units)
            read.append(rows)
            accepted.append(kept.drop("raw"))
            quarantined += [broken, rejected]
    candidates = _concat(accepted, CANDIDATE_SCHEMA).drop("raw", strict=False)
    pairs = merge_pairs(candidates, plan.split)
    rows = row_fates(_concat(read, pl.Schema(_READ_SCHEMA)), candidates)
    quarantine = _concat(quarantined, polars_schema(QuarantinedRow)).sort(
        "source", "file", "row", "unit"
    )
    result = IntakeResult(
        pairs=publish(store, "pairs", pairs, PreferencePair),
        rows=publish(store, "rows", rows, InputRow),
        quarantine=publish(store, "quarantine", quarantine, QuarantinedRow),
        law=row_law(rows, dict(n_read), pairs),
        quarantined_by_rule=_counts(quarantine["rule"]),
        pairs_by_split=_counts(pairs["split"]),
        flags=_counts(pairs["flags"].explode().drop_nulls()),
    )
    if pairs.is_empty():
        raise SourceError(
            f"no valid pair in {', '.join(n_read)}: {sum(n_read.values())} rows read, "
            f"quarantined by rule: {result.quarantined_by_rule}; see {result.quarantine.path}"
        )
    return result


def sources_digest(plan: Plan) -> str:
    """An id of the bytes of every source file, for Dagster's data version.

    Raises:
        SourceError: a source is missing.
    """
    everything = {**plan.sources, **plan.evaluation}
    return content_id(
        "sources",
        {
            name: [
                [config.shape, file, file_digest(path)] for file, path in source_files(name, config)
            ]
            for name, config in everything.items()
        },
    )


def source_files(name: str, config: SourceConfig) -> list[tuple[str, Path]]:
    """A source's files, each with the name the tables give it."""
    if config.path.is_file():
        return [(config.path.name, config.path)]
    if not config.path.is_dir():
        raise SourceError(f"source '{name}': {config.path}: no such file or folder")
    found = sorted(p for p in config.path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if not found:
        raise SourceError(f"source '{name}': {config.path}: no file ends in {', '.join(SUFFIXES)}")
    files = [(str(path.relative_to(config.path)), path) for path in found]
    for file, _ in files:
        if file.encode(errors="replace").decode() != file:
            raise SourceError(f"source '{name}': {config.path}: {file!a}: its name is not UTF-8")
    return files


def _chunks(name: str, config: SourceConfig) -> Iterator[list[tuple[str, RawRow]]]:
    chunk: list[tuple[str, RawRow]] = []
    for file, path in source_files(name, config):
        for row in frame_rows(path):
            chunk.append((file, row))
            if len(chunk) == _CHUNK_ROWS:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _read_chunk(
    source: str, config: SourceConfig, chunk: list[tuple[str, RawRow]], evaluation: bool
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    reader = READERS[config.shape]
    read, units, broken = [], [], []
    for file, raw in chunk:
        place = {"source": source, "file": file, "row": raw.row, "byte_offset": raw.byte_offset}
        read.append(place)
        text = raw.data[: 4 * RAW_CAP].decode("utf-8", errors="replace")[:RAW_CAP]
        try:
            found = reader(parse_object(raw.data), ReadOptions())
        except RowError as error:
            found = [error]
        for i, unit in enumerate(found):
            at = {**place, "unit": i, "raw": text}
            match unit:
                case RowError(rule=rule, detail=detail):
                    broken.append({**at, "rule": rule, "detail": detail})
                case Unit():
                    units.append({**at, "evaluation": evaluation, **_columns(unit)})
                case _:
                    raise SourceError(f"source '{source}': labels and candidates are no pairs yet")
    return (
        pl.DataFrame(read, schema=_READ_SCHEMA),
        pl.DataFrame(units, schema=CANDIDATE_SCHEMA),
        pl.DataFrame(broken, schema=polars_schema(QuarantinedRow)),
    )


def _columns(unit: Unit) -> dict[str, object]:
    prompt = [[message["role"], message["content"]] for message in unit.prompt]
    return {
        "prompt": unit.prompt,
        "chosen": unit.chosen,
        "rejected": unit.rejected,
        "strength": unit.strength,
        "meta": json.dumps(unit.meta, ensure_ascii=False, sort_keys=True),
        "prompt_id": content_id("prompt", prompt),
        "pair_id": content_id("pair", prompt, unit.chosen, unit.rejected),
        "reverse_id": content_id("pair", prompt, unit.rejected, unit.chosen),
    }


def _concat(frames: list[pl.DataFrame], schema: pl.Schema) -> pl.DataFrame:
    filled = [frame for frame in frames if frame.height]
    return pl.concat(filled) if filled else pl.DataFrame(schema=schema)


def _counts(values: pl.Series) -> dict[str, int]:
    return dict(sorted(Counter(values.to_list()).items()))
