"""Committing scored sequences, and reading them back."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import StoreError
from pipeline.failpoints import reach
from pipeline.locks import locked
from pipeline.models import ModelIdentity
from pipeline.scoring.engines.base import Numerics
from pipeline.scoring.ledger.manifests import (
    FOLDER,
    Manifest,
    Part,
    commit_manifest,
    in_force,
    present,
    set_aside,
)
from pipeline.store import checked, commit, read_verified, write_parquet
from schemas import (
    LogProb,
    Scorer,
    SequenceExtra,
    Table,
    TokenExtra,
    TokenLogProb,
    UnscoredSequence,
    polars_schema,
)

TABLES: dict[str, type[Table]] = {
    "logprobs": LogProb,
    "token_logprobs": TokenLogProb,
    "extras": SequenceExtra,
    "token_extras": TokenExtra,
    "unscored": UnscoredSequence,
}
"""The tables of the ledger, each in part files of its own."""


def key_columns(name: str) -> list[str]:
    """What a row of a table is known by; of two with the same, the first committed wins."""
    return ["sequence_id", "extra"] if name.endswith("extras") else ["sequence_id"]


@dataclass(frozen=True)
class ScorerKey:
    """One way of scoring, and its place in the ledger."""

    ledger: Path
    model: ModelIdentity
    numerics: Numerics

    @property
    def directory(self) -> Path:
        """Where this scorer's parts are."""
        return self.ledger / self.model.model_id / self.numerics.numerics_id


def append(
    key: ScorerKey,
    logprobs: pl.DataFrame,
    tokens: pl.DataFrame,
    provenance: dict[str, Any],
    unscored: pl.DataFrame | None = None,
    extras: tuple[pl.DataFrame, pl.DataFrame] | None = None,
) -> None:
    """Commit scored sequences: all of them or none.

    Sequences whose extras alone were missing have no rows in `logprobs` and `tokens`.

    Args:
        key: the scorer.
        logprobs: `schemas.LogProb` rows.
        tokens: `schemas.TokenLogProb` rows of the same sequences.
        provenance: the columns of `schemas.Scorer` so marked, of this commit.
        unscored: `schemas.UnscoredSequence` rows, of sequences that were tried in vain.
        extras: `schemas.SequenceExtra` rows, and `schemas.TokenExtra` rows of the same.

    Raises:
        pandera.errors.SchemaErrors: the rows break their contract.
        StoreError: a value is not finite, or the disk failed (naming the path).
    """
    frames = {"logprobs": logprobs, "token_logprobs": tokens}
    if extras is not None:
        frames["extras"], frames["token_extras"] = extras
    if unscored is not None:
        frames["unscored"] = unscored
    valid = {
        name: checked(name, frame.sort(key_columns(name)), TABLES[name])
        for name, frame in frames.items()
    }
    scorer = {
        "model_id": key.model.model_id,
        "numerics_id": key.numerics.numerics_id,
        **asdict(key.model),
        **asdict(key.numerics),
        **provenance,
    }
    reach("ledger.begun")
    with locked(key.directory):
        commit_manifest(key.directory, commit_parts(key.directory, valid), scorer)
    reach("ledger.committed")


def commit_parts(directory: Path, frames: dict[str, pl.DataFrame]) -> dict[str, Part]:
    """Write the tables that have rows as part files; nobody's until a manifest names them."""
    parts = {}
    for name, frame in frames.items():
        if frame.is_empty():
            continue
        snapshot = commit(
            directory / name,
            lambda sink, frame=frame, name=name: write_parquet(sink, frame, name),  # type: ignore[misc]
            ".parquet",
        )
        parts[name] = Part(snapshot.path.name, snapshot.digest, snapshot.n_bytes, frame.height)
        reach("ledger.part")
    reach("ledger.parts")
    return parts


def read_logprobs(key: ScorerKey) -> pl.DataFrame:
    """Every sequence this scorer has scored, `schemas.LogProb`, sorted by sequence id.

    Damaged commits are set aside with a warning; their sequences are missing here.
    """
    return _read(key, "logprobs")


def read_token_logprobs(key: ScorerKey) -> pl.DataFrame:
    """The same token by token, `schemas.TokenLogProb`."""
    return _read(key, "token_logprobs")


def read_extras(key: ScorerKey) -> pl.DataFrame:
    """Every extra of a sequence, `schemas.SequenceExtra`, sorted by sequence id and extra."""
    return _read(key, "extras")


def read_token_extras(key: ScorerKey) -> pl.DataFrame:
    """The same token by token, `schemas.TokenExtra`."""
    return _read(key, "token_extras")


def read_complete(key: ScorerKey, extras: Collection[str]) -> pl.DataFrame:
    """`read_logprobs` of the sequences that have all these extras as well."""
    if not extras:
        return read_logprobs(key)
    # First, since a commit that is found damaged takes its log-probs along.
    found = read_extras(key).filter(pl.col("extra").is_in(list(extras)))
    whole = found.group_by("sequence_id").len().filter(pl.col("len") == len(set(extras)))
    return read_logprobs(key).join(whole, on="sequence_id", how="semi").sort("sequence_id")


def read_unscored(key: ScorerKey, extras: Collection[str] = ()) -> pl.DataFrame:
    """The sequences that were tried in vain and not scored since, `schemas.UnscoredSequence`.

    Those that lack one of `extras` are not scored yet.
    """
    tried = _read(key, "unscored")
    if tried.is_empty():
        return tried
    return tried.join(read_complete(key, extras), on="sequence_id", how="anti")


def scorers(ledger: Path) -> pl.DataFrame:
    """The `scorers` table: every way of scoring in the ledger, as first committed."""
    rows = [found[0].scorer for d in scorer_directories(ledger) if (found := present(d))]
    return pl.DataFrame(rows, schema=polars_schema(Scorer))


def scorer_directories(ledger: Path) -> list[Path]:
    """Where the scorers of a ledger are, in order of their ids."""
    return sorted(path.parent for path in ledger.glob(f"*/*/{FOLDER}"))


def read_commits(
    directory: Path, name: str, only: frozenset[str] | None = None
) -> tuple[list[Manifest], dict[str, pl.DataFrame]]:
    """The commits in force in a scorer's directory, in order, and a table's part of each by seal.

    What is damaged is set aside. A reader takes no lock: when what it reads is replaced and
    collected meanwhile, it begins anew. `only` names the commits wanted by their seals.
    """
    frames: dict[str, pl.DataFrame] = {}
    bad: set[str] = set()
    while True:
        commits = in_force([one for one in present(directory) if one.seal not in bad])
        if only is not None:
            commits = [one for one in commits if one.seal in only]
        for one in commits:
            if one.seal in frames or name not in one.parts:
                continue
            try:
                frames[one.seal] = read_part(directory, one, name)
            except StoreError as error:
                if one.path.exists():
                    bad.add(one.seal)
                    set_aside(one.path, error)
                break  # what it replaced, if that is still there, is in force again
        else:
            return commits, frames


def merged(commits: list[Manifest], frames: dict[str, pl.DataFrame], name: str) -> pl.DataFrame:
    """A table of some commits: of two rows for one key, the first committed; sorted by key."""
    empty, columns = pl.DataFrame(schema=polars_schema(TABLES[name])), key_columns(name)
    return (
        pl.concat([empty, *(frames[one.seal] for one in commits if one.seal in frames)])
        .unique(columns, keep="first", maintain_order=True)
        .sort(columns)
    )


def _read(key: ScorerKey, name: str) -> pl.DataFrame:
    return merged(*read_commits(key.directory, name), name)


def read_part(directory: Path, one: Manifest, name: str) -> pl.DataFrame:
    """A table of a commit.

    Raises:
        StoreError: damaged, or another scorer's: it must not be believed.
    """
    part = one.parts[name]
    path = directory / name / part.file
    frame = read_verified(path, name, part.blake3, part.bytes)
    if frame.schema != polars_schema(TABLES[name]):
        raise StoreError(f"{path}: its columns are not those of '{name}'")
    found = frame.select("model_id", "numerics_id").unique().rows()
    if found != [(directory.parent.name, directory.name)]:
        raise StoreError(f"{path}: its rows are another scorer's")
    return frame
