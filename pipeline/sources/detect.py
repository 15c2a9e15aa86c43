"""Which shape a file has, by trying its first rows."""

from itertools import islice
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.base import RowError
from pipeline.sources.files import frame_rows
from pipeline.sources.readers import READERS
from pipeline.sources.strict_json import parse_object

_TRIED = 50


def shape_of(path: Path) -> str:
    """The shape whose reader understands most of the file's first 50 rows.

    Raises:
        SourceError: no reader understands any of them (what each said of the first), or the file
            cannot be read.
    """
    understood = dict.fromkeys(READERS, 0)
    said: dict[str, str] = {}
    for raw in islice(frame_rows(path), _TRIED):
        for shape, read in READERS.items():
            try:
                understood[shape] += bool(read(parse_object(raw.data)))
            except RowError as error:
                said.setdefault(shape, str(error))
    best = max(understood, key=understood.__getitem__)
    if not understood[best]:
        complaints = "; ".join(f"as {shape}: {error}" for shape, error in said.items())
        raise SourceError(f"{path}: no shape fits its first rows ({complaints or 'it is empty'})")
    return best
