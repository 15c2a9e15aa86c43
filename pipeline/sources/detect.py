"""Which shape a file has, by trying its first rows."""

from itertools import islice
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.base import ReadOptions, RowError
from pipeline.sources.files import SourceFile, frame_rows
from pipeline.sources.readers import READERS, Reader
from pipeline.sources.strict_json import parse_row

_TRIED = 50
_NO_WINNER = ("tied", "gap_too_small")


def shape_of(file: SourceFile | Path, options: ReadOptions | None = None) -> str:
    """The shape whose reader understands the file's first 50 rows best.

    A reader understands a row it makes something of, be it that its candidates are tied. Of the
    shapes that understand at least half as many rows as the best one, the first in the order of
    `READERS` is taken: plain texts are transcripts where most begin with a turn, and alpaca's
    where they have an instruction.

    Args:
        file: the file.
        options: as for the readers; their `columns` count.

    Raises:
        SourceError: no reader understands any of them (what each said of the first), or the file
            cannot be read.
    """
    understood = dict.fromkeys(READERS, 0)
    said: dict[str, str] = {}
    for raw in islice(frame_rows(file), _TRIED):
        try:
            row = parse_row(raw)
        except RowError as error:
            said.setdefault("JSON", str(error))
            continue
        for shape, read in READERS.items():
            if refusal := _refusal(read, row, options or ReadOptions()):
                said.setdefault(shape, str(refusal))
            else:
                understood[shape] += 1
    most = max(understood.values())
    if not most:
        complaints = "; ".join(f"as {shape}: {error}" for shape, error in said.items())
        shown = file.shown if isinstance(file, SourceFile) else file
        raise SourceError(f"{shown}: no shape fits its first rows ({complaints or 'it is empty'})")
    return next(shape for shape, count in understood.items() if 2 * count >= most)


def _refusal(read: Reader, row: dict[str, object], options: ReadOptions) -> RowError | None:
    """Why a reader makes nothing of a row."""
    try:
        found = read(row, options)
    except RowError as error:
        found = [error]
    errors = [unit for unit in found if isinstance(unit, RowError) and unit.rule not in _NO_WINNER]
    return errors[0] if errors and len(errors) == len(found) else None
