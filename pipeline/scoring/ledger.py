"""The ledger: every log-prob ever computed, once, under the identity of what computed it.

    <ledger>/<model_id>/<numerics_id>/logprobs/<hash>.parquet
                                      token_logprobs/<hash>.parquet
                                      manifest/<number>.json

A commit writes two part files and then a manifest that names them with size and hash; a part no
manifest names does not exist. Manifest numbers order the commits: of two values for one sequence,
the first committed wins, for ever. What is damaged is set aside and so scored again.
"""

import contextlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3
import polars as pl

from pipeline.errors import StoreError
from pipeline.models import ModelIdentity
from pipeline.scoring.engines.base import Numerics
from pipeline.store import (
    Snapshot,
    checked,
    commit,
    commit_numbered,
    read_snapshot,
    sync_directory,
    verify,
    write_parquet,
)
from schemas import LogProb, Scorer, Table, TokenLogProb, polars_schema

_log = logging.getLogger(__name__)
_TABLES: dict[str, type[Table]] = {"logprobs": LogProb, "token_logprobs": TokenLogProb}


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
    key: ScorerKey, logprobs: pl.DataFrame, tokens: pl.DataFrame, provenance: dict[str, Any]
) -> None:
    """Commit scored sequences: all of them or none.

    Args:
        key: the scorer.
        logprobs: `schemas.LogProb` rows.
        tokens: `schemas.TokenLogProb` rows of the same sequences.
        provenance: the columns of `schemas.Scorer` so marked, of this commit.

    Raises:
        pandera.errors.SchemaErrors: the rows break their contract.
        StoreError: a value is not finite, or the disk failed (naming the path).
    """
    parts = {}
    for name, frame in (("logprobs", logprobs), ("token_logprobs", tokens)):
        valid = checked(name, frame.sort("sequence_id"), _TABLES[name])
        snapshot = _commit_part(key, name, valid)
        parts[name] = {
            "file": snapshot.path.name,
            "blake3": snapshot.digest,
            "bytes": snapshot.n_bytes,
            "rows": frame.height,
        }
    body = {"parts": parts, "scorer": {**_identity_row(key), **provenance}}
    text = json.dumps(body, sort_keys=True)
    sealed = json.dumps({"blake3": blake3.blake3(text.encode()).hexdigest(), "body": text})
    commit_numbered(key.directory / "manifest", sealed.encode(), ".json")


def read_logprobs(key: ScorerKey) -> pl.DataFrame:
    """Every sequence this scorer has scored, `schemas.LogProb`, sorted by sequence id.

    Damaged commits are set aside with a warning; their sequences are missing here.
    """
    return _read(key, "logprobs")


def read_token_logprobs(key: ScorerKey) -> pl.DataFrame:
    """The same token by token, `schemas.TokenLogProb`."""
    return _read(key, "token_logprobs")


def scorers(ledger: Path) -> pl.DataFrame:
    """The `scorers` table: every way of scoring in the ledger, as first committed."""
    rows = []
    for directory in sorted(ledger.glob("*/*/manifest")):
        for manifest in sorted(directory.glob("*.json")):
            try:
                rows.append(_open_manifest(manifest)["scorer"])
            except StoreError:
                continue
            break
    return pl.DataFrame(rows, schema=polars_schema(Scorer))


def record_trust(key: ScorerKey, result: dict[str, Any]) -> None:
    """Keep the outcome of a trust gate beside the numbers it is about."""
    commit_numbered(key.directory / "trust", json.dumps(result, sort_keys=True).encode(), ".json")


def last_trust(key: ScorerKey) -> dict[str, Any] | None:
    """The newest recorded outcome, or None."""
    newest = max((key.directory / "trust").glob("*.json"), default=None)
    if newest is None:
        return None
    result: dict[str, Any] = json.loads(newest.read_text())
    return result


def _commit_part(key: ScorerKey, name: str, frame: pl.DataFrame) -> Snapshot:
    return commit(key.directory / name, lambda sink: write_parquet(sink, frame, name), ".parquet")


def _identity_row(key: ScorerKey) -> dict[str, Any]:
    return {
        "model_id": key.model.model_id,
        "numerics_id": key.numerics.numerics_id,
        **asdict(key.model),
        **asdict(key.numerics),
    }


def _read(key: ScorerKey, name: str) -> pl.DataFrame:
    frames = []
    for manifest in sorted((key.directory / "manifest").glob("*.json")):
        try:
            part = _open_manifest(manifest)["parts"][name]
            path = key.directory / name / part["file"]
            verify(path, part["blake3"], part["bytes"])
            frame = read_snapshot(path, name)
            _belongs(frame, key, path)
        except StoreError as error:
            _log.warning("set aside, will be scored again: %s", error)
            _set_aside(manifest)
        else:
            frames.append(frame)
    empty = pl.DataFrame(schema=polars_schema(_TABLES[name]))
    return (
        pl.concat([empty, *frames])
        .unique("sequence_id", keep="first", maintain_order=True)
        .sort("sequence_id")
    )


def _belongs(frame: pl.DataFrame, key: ScorerKey, path: Path) -> None:
    """A part put under another scorer's directory must not be believed."""
    found = frame.select("model_id", "numerics_id").unique().rows()
    if found != [(key.model.model_id, key.numerics.numerics_id)]:
        raise StoreError(f"{path}: its rows are another scorer's")


def _open_manifest(path: Path) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_bytes())
        text = sealed["body"]
        if blake3.blake3(text.encode()).hexdigest() != sealed["blake3"]:
            raise ValueError("its bytes do not have the hash it names")
        body: dict[str, Any] = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: damaged: {error}") from error
    return body


def _set_aside(manifest: Path) -> None:
    """Take a commit out of the ledger; its bytes stay for whoever wants to know."""
    aside = manifest.parent.parent / "set_aside"
    aside.mkdir(exist_ok=True)
    number = len(list(aside.iterdir()))
    with contextlib.suppress(FileNotFoundError):  # another reader has done it
        os.replace(manifest, aside / f"{number:08d}-{manifest.name}")
    sync_directory(manifest.parent)
