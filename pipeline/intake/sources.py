"""A source's files and rows, and what they are worth as a version."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.ids import content_id
from pipeline.plan import Plan, SourceConfig
from pipeline.sources import SUFFIXES, RawRow, frame_rows
from pipeline.store import file_digest
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


def raw_rows(name: str, config: SourceConfig) -> Iterator[tuple[str, RawRow]]:
    """A source's rows, each with the name of its file."""
    for file, path in source_files(name, config):
        for row in frame_rows(path):
            yield file, row
