"""A source's rows, their shape, and what they are worth as a version."""

from collections.abc import Iterator

from pipeline.ids import content_id
from pipeline.plan import Plan, SourceConfig
from pipeline.sources import RawRow, frame_rows, shape_of, source_digest, source_files


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
                [config.shape, file.name, source_digest(file)]
                for file in source_files(name, config.path)
            ]
            for name, config in everything.items()
        },
    )


def shape_of_source(name: str, config: SourceConfig) -> str:
    """The shape a plan names, or that of the source's first file.

    Raises:
        SourceError: nothing is there, or no shape fits.
    """
    return config.shape or shape_of(source_files(name, config.path)[0], config.options)


def raw_rows(name: str, config: SourceConfig) -> Iterator[tuple[str, RawRow]]:
    """A source's rows, each with the name of its file.

    Raises:
        SourceError: nothing is there, or a file cannot be read.
    """
    for file in source_files(name, config.path):
        for row in frame_rows(file):
            yield file.name, row
