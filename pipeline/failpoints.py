"""Faults on purpose, so that tests can crash the store wherever it could crash.

`LOGRATIO_FAIL=store.linked:kill@3` kills this process with SIGKILL when it comes to the point
`store.linked` for the third time; `enospc` and `eio` fail there as a full or broken disk does.
Several are separated by commas. Unset, a point costs one look at an empty dictionary.
"""

import errno
import os
import signal
from collections import Counter

POINTS = (
    "store.opened",  # a temporary file is there, empty
    "store.written",  # it is written, and maybe not on the disk
    "store.synced",  # its bytes are on the disk
    "store.linked",  # it has its final name, maybe not on the disk
    "store.numbered",  # the same of a manifest
    "store.durable",  # the name is on the disk too; the temporary one is still there
    "pointer.made",  # the new pointer is there under a temporary name
    "pointer.moved",  # it is the pointer, maybe not on the disk
    "ledger.begun",  # a commit of scored sequences begins
    "ledger.part",  # one of its parts is there
    "ledger.parts",  # all are; no manifest names them
    "ledger.committed",  # the manifest is there
    "ledger.set_aside",  # a damaged manifest is about to be moved
    "compact.read",  # what is to be merged has been read
    "compact.committed",  # the merged parts are in the ledger, beside what they replace
    "collect.manifest",  # a replaced manifest is gone
    "collect.manifests",  # all are
    "collect.file",  # a file that nobody names is gone
    "checkpoint.begun",  # a checkpoint's folder is there under a temporary name, empty
    "checkpoint.written",  # its weights are in it
    "checkpoint.published",  # it has its name, and the ones before are still there
    "policy.begun",  # a policy's folder is there under a temporary name, empty
    "policy.written",  # all is in it
    "policy.published",  # it has its name, and its checkpoints are still there
)
"""Every point, in the order of the modules that have them."""

_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
_armed: dict[str, tuple[str, int]] = {}
_passed: Counter[str] = Counter()


def arm(said: str) -> None:
    """Set faults as `LOGRATIO_FAIL` does; empty for none. Counts begin anew.

    Raises:
        ValueError: no such point or action, or not of the form `point:action@n`.
    """
    _armed.clear()
    _passed.clear()
    for one in filter(None, said.split(",")):
        point, _, how = one.partition(":")
        action, _, n = how.partition("@")
        if point not in POINTS or action not in (*_ERRORS, "kill", "count"):
            raise ValueError(f"LOGRATIO_FAIL: '{one}' is not point:action@n with a known point")
        _armed[point] = action, int(n or 1)


def passed() -> dict[str, int]:
    """How often each armed point was come to."""
    return dict(_passed)


def reach(point: str) -> None:
    """Say that this point is reached.

    Raises:
        OSError: if that is the fault that was set here.
    """
    if _armed and point in _armed:
        _fail(point)


def _fail(point: str) -> None:
    _passed[point] += 1
    action, n = _armed[point]
    if action == "count" or _passed[point] != n:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(_ERRORS[action], os.strerror(_ERRORS[action]))


arm(os.environ.get("LOGRATIO_FAIL", ""))
