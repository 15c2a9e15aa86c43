"""Where tables live: immutable snapshots named by their digest, and a `current` pointer.

A snapshot is written to a temporary file, synced, hashed, and linked to a name made of its hash;
the pointer moves last. A reader therefore sees the old table or the new one, never half of one.
Readers verify size and hash before parsing: Polars does not check Parquet's own checksums.
"""

from pipeline.store.files import (
    Snapshot,
    commit,
    commit_numbered,
    file_bytes,
    file_digest,
    move_pointer,
    sync_directory,
    verify,
    whole_directory,
)
from pipeline.store.parquet import checked, read_snapshot, read_verified, write_parquet
from pipeline.store.published import (
    Store,
    TableSnapshot,
    current_snapshot,
    is_published,
    publish,
    publish_file,
    publish_pieces,
    read,
    read_pieces,
)

__all__ = [
    "Snapshot",
    "Store",
    "TableSnapshot",
    "checked",
    "commit",
    "commit_numbered",
    "current_snapshot",
    "file_bytes",
    "file_digest",
    "is_published",
    "move_pointer",
    "publish",
    "publish_file",
    "publish_pieces",
    "read",
    "read_pieces",
    "read_snapshot",
    "read_verified",
    "sync_directory",
    "verify",
    "whole_directory",
    "write_parquet",
]
