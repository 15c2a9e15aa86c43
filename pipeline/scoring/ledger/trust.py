"""Outcomes of trust gates, kept beside the numbers they are about."""

import json
from typing import Any

from pipeline.locks import locked
from pipeline.scoring.ledger.commits import ScorerKey
from pipeline.store import commit_numbered


def record_trust(key: ScorerKey, result: dict[str, Any]) -> None:
    """Keep the outcome of a trust gate beside the numbers it is about."""
    with locked(key.directory):
        commit_numbered(
            key.directory / "trust", json.dumps(result, sort_keys=True).encode(), ".json"
        )


def last_trust(key: ScorerKey) -> dict[str, Any] | None:
    """The newest recorded outcome, or None."""
    newest = max((key.directory / "trust").glob("*.json"), default=None)
    if newest is None:
        return None
    result: dict[str, Any] = json.loads(newest.read_text())
    return result
