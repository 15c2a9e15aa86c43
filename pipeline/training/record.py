"""`policy.json`: what a policy came from."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.store import verify

RECORD = "policy.json"


def read_record(directory: Path) -> dict[str, Any]:
    """A policy's `policy.json`.

    Raises:
        StoreError: it cannot be read, or an earlier version wrote it.
    """
    path = directory / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if "start_model_id" not in record:
        raise StoreError(f"{path}: an earlier version wrote this policy; train it again")
    return record


def intact_record(directory: Path) -> dict[str, Any]:
    """`read_record`, after a look at the bytes of the policy's weights.

    Raises:
        StoreError: see `read_record`, or a file is missing or damaged.
    """
    record = read_record(directory)
    for name, digest in record["blake3"].items():
        if name.endswith(".safetensors"):
            verify(directory / name, digest)
    return record


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write `policy.json`."""
    (directory / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True))
