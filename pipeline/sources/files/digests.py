"""What changes when a file's bytes do, for Dagster's data version."""

from pathlib import Path
from typing import Any

import blake3

from pipeline.errors import SourceError
from pipeline.sources.files.locations import (
    SourceFile,
    filesystem,
    is_local,
    open_raw,
    said,
)
from pipeline.store import file_digest

_BLOCK = 1 << 20


def source_digest(file: SourceFile) -> str:
    """BLAKE3 of a file's bytes as stored; of a remote one, the store's own checksum if it has one.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        if is_local(file.url):
            return file_digest(Path(file.url))
        system, path = filesystem(file.url)
        protocol = file.url.partition("://")[0]
        if (checksum := _checksum(protocol, system.info(path))) is not None:
            return f"{protocol}:{checksum}"
        hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
        with open_raw(file) as stream:
            while block := stream.read(_BLOCK):
                hasher.update(block)
        return hasher.hexdigest()
    except Exception as error:  # each protocol has its own
        raise SourceError(f"{file.shown}: cannot be read: {said(error, file.url)}") from error


def _checksum(protocol: str, info: dict[str, Any]) -> str | None:
    """A checksum of the content among what a store says of a file; no times, no names."""
    if protocol == "hf":
        lfs = info.get("lfs") or {}
        found = (lfs.get("sha256") if isinstance(lfs, dict) else None) or info.get("blob_id")
    elif protocol in ("s3", "s3a"):
        found = info.get("ETag")
    elif protocol in ("gs", "gcs"):
        found = info.get("md5Hash") or info.get("crc32c")
    else:
        found = None
    return str(found).strip('"') if found else None
