"""What a rank says when it fails, and which of several ranks' words is the cause.

A rank writes `rank-<n>.json`; torchrun's exit codes stand in `ended.json`. When one fails, the
others lose the connection or are ended, so most of what is there is only its consequence.
"""

import json
import signal
import time
import traceback
from pathlib import Path

from pipeline import errors
from pipeline.errors import LogratioError, TrainingError

_ENDED = "ended.json"
_SHOWN = 2000
"""Characters of a rank's last words."""


def write_error(folder: Path, rank: int, error: BaseException) -> None:
    """Leave an error where `cause_of` finds it."""
    said = {
        "kind": type(error).__name__,
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
        "at": time.time(),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(said))


def write_ended(folder: Path, codes: dict[int, int]) -> None:
    """Leave the exit codes of the ranks that failed; a signal's is negative."""
    (folder / _ENDED).write_text(json.dumps(codes))


def cause_of(folder: Path, n: int, where: str) -> LogratioError:
    """Why n ranks failed: an error of ours, else one's end without a word, else the first error.

    An error of ours is as it was raised; all else is a `TrainingError` that names the process and
    `where` training stood, with its traceback or last words as a note.
    """
    said = {
        int(path.stem.removeprefix("rank-")): json.loads(path.read_text())
        for path in folder.glob("rank-*.json")
    }
    for _, one in sorted(said.items()):
        kind = getattr(errors, one["kind"], None)
        if isinstance(kind, type) and issubclass(kind, LogratioError):
            return kind(one["message"])
    codes = json.loads((folder / _ENDED).read_text()) if (folder / _ENDED).exists() else {}
    for rank, code in sorted((int(rank), code) for rank, code in codes.items()):
        if rank in said or code == -signal.SIGTERM:  # torchrun ends the others with that
            continue
        how = f"was ended by {_signal(-code)}" if code < 0 else f"ended with status {code}"
        return _error(f"process {rank} of {n} {how}, {where}", _last_words(folder, rank))
    if said:
        rank, one = min(said.items(), key=lambda item: float(item[1]["at"]))
        message = f"process {rank} of {n}, {where}: {one['kind']}: {one['message']}"
        return _error(message, one["trace"])
    return TrainingError(f"the {n} processes of training ended and none said why, {where}")


def _error(message: str, note: str) -> TrainingError:
    error = TrainingError(message)
    if note:
        error.add_note(note)
    return error


def _last_words(folder: Path, rank: int) -> str:
    """The end of what a rank printed where torchrun redirects it: of all but the first."""
    logs = folder.glob(f"logs/*/attempt_0/{rank}/stderr.log")
    return "".join(log.read_text(errors="replace")[-_SHOWN:].strip() for log in logs)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
