"""What a ledger holds, and whether it holds what it says."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import StoreError
from pipeline.models import ModelIdentity
from pipeline.scoring.engines.base import Numerics
from pipeline.scoring.ledger.commits import (
    key_columns,
    merged,
    read_commits,
    read_part,
    scorer_directories,
)
from pipeline.scoring.ledger.manifests import ASIDE, Manifest, in_force, present

_COLUMNS = {
    "model_id": pl.String,
    "numerics_id": pl.String,
    "checkpoint": pl.String,
    "engine": pl.String,
    "body_dtype": pl.String,
    "device_class": pl.String,
    "commits": pl.Int64,
    "sequences": pl.Int64,
    "tokens": pl.Int64,
    "extras": pl.Int64,
    "unscored": pl.Int64,
    "bytes": pl.Int64,
    "set_aside": pl.Int64,
}


@dataclass(frozen=True)
class Fault:
    """Something in a ledger that is not what it should be."""

    path: Path
    what: str


def inventory(ledger: Path) -> pl.DataFrame:
    """One row is a way of scoring: what it has scored, in how many commits and bytes.

    `tokens` are scored ones; `extras` count what sequences have beside log-probs; `bytes` are those
    of all files in its directory, garbage included.
    """
    rows = []
    for directory in scorer_directories(ledger):
        commits, frames = read_commits(directory, "logprobs")
        held = merged(commits, frames, "logprobs")
        extras = merged(*read_commits(directory, "extras"), "extras")
        tried = merged(*read_commits(directory, "unscored"), "unscored")
        said: dict[str, Any] = commits[0].scorer if commits else {}
        rows.append(
            {
                "model_id": directory.parent.name,
                "numerics_id": directory.name,
                "checkpoint": said.get("checkpoint"),
                "engine": f"{said.get('engine', '?')} {said.get('engine_version', '?')}",
                "body_dtype": said.get("body_dtype"),
                "device_class": said.get("device_class"),
                "commits": len(commits),
                "sequences": held.height,
                "tokens": held["n_tokens"].sum(),
                "extras": extras.height,
                "unscored": tried.join(held, on="sequence_id", how="anti").height,
                "bytes": sum(p.lstat().st_size for p in directory.rglob("*") if not p.is_dir()),
                "set_aside": len(list((directory / ASIDE).glob("*"))),
            }
        )
    return pl.DataFrame(rows, schema=_COLUMNS)


def verify_ledger(ledger: Path) -> list[Fault]:
    """Read every byte of every commit and name what is wrong; nothing is changed.

    Checked are manifests against their seals, parts against size, hash, table, columns and number
    of rows, ids against the scorer that is spelled out, sums against their tokens, and whether a
    sequence's extras are of as many tokens as its log-prob.
    """
    return [fault for d in scorer_directories(ledger) for fault in _faults(d)]


def _faults(directory: Path) -> Iterator[Fault]:
    damaged: list[Fault] = []
    manifests = present(
        directory, damaged=lambda path, error: damaged.append(Fault(path, str(error)))
    )
    yield from damaged
    for one in manifests:
        if (ids := _ids(one)) != (directory.parent.name, directory.name):
            yield Fault(one.path, f"its scorer's ids are {ids}")
    lengths: list[pl.DataFrame] = []
    extras: list[tuple[Manifest, pl.DataFrame]] = []
    replaced = {one.name for one in manifests} - {one.name for one in in_force(manifests)}
    for one in manifests:
        frames = {}
        for name, part in one.parts.items():
            try:
                frames[name] = read_part(directory, one, name)
            except StoreError as error:
                kind = " (replaced by another commit)" if one.name in replaced else ""
                yield Fault(directory / name / part.file, f"{error}{kind}")
                continue
            if frames[name].height != part.rows:
                yield Fault(one.path, f"'{name}' has {frames[name].height} rows, not {part.rows}")
        for sums, tokens in _TOKENS.items():
            if {sums, tokens} <= frames.keys() and (wrong := _unequal(frames, sums, tokens)):
                yield Fault(one.path, f"{wrong} sums are not those of their tokens")
        if "logprobs" in frames:
            lengths.append(frames["logprobs"].select("sequence_id", n="n_tokens"))
        if "extras" in frames:
            extras.append((one, frames["extras"]))
    if not lengths:
        return
    of_logprobs = pl.concat(lengths).unique("sequence_id")
    for one, frame in extras:
        both = frame.join(of_logprobs, on="sequence_id")
        if wrong := both.filter(pl.col("n_tokens") != pl.col("n")).height:
            yield Fault(one.path, f"{wrong} extras are of other tokens than the log-probs")


def _ids(one: Manifest) -> tuple[str, str]:
    """The ids that the fields of a commit's scorer make."""
    model, numerics = (
        {f.name: one.scorer.get(f.name) for f in fields(kind)} for kind in (ModelIdentity, Numerics)
    )
    return ModelIdentity(**model).model_id, Numerics(**numerics).numerics_id  # type: ignore[arg-type]


_TOKENS = {"logprobs": "token_logprobs", "extras": "token_extras"}
"""A table of sums, and the one with what was added up."""

_ADDED = {"logprobs": ("logprob", "logprobs"), "extras": ("total", "values")}
"""The columns of both."""


def _unequal(frames: dict[str, pl.DataFrame], sums: str, tokens: str) -> int:
    """Rows of a commit whose sum, or number of tokens, is not that of their tokens."""
    both = frames[sums].join(frames[tokens], on=key_columns(sums), how="full")
    total, values = _ADDED[sums]
    rows = both.select(total, "n_tokens", values).iter_rows()
    return sum(
        total is None or tokens is None or len(tokens) != n or math.fsum(tokens) != total
        for total, n, tokens in rows
    )
