"""`logratio ledger`: what the ledger of a store holds, whether it is sound, and its upkeep."""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.scoring.ledger import (
    collect,
    compact,
    inventory,
    scorer_directories,
    verify_ledger,
)

Said = tuple[list[str], bool]
"""Lines for a terminal, and whether all is well."""

_MIB = 1 << 20


def add_ledger_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ledger` with its actions to the command line."""
    ledger = commands.add_parser("ledger", help="look after the log-probs of a store")
    actions = ledger.add_subparsers(dest="action", required=True)
    for name, (_, said) in ACTIONS.items():
        action = actions.add_parser(name, help=said)
        action.add_argument("store", type=Path, help="the directory a plan calls its store")
        if name == "gc":
            action.add_argument("--remove", action="store_true", help="do it, not only say it")


def look_after(action: str, store: Path, remove: bool = False) -> Said:
    """Do it, and say what was found or done.

    Raises:
        StoreError: there is no ledger, or the disk failed.
    """
    ledger = store / "ledger"
    if not ledger.is_dir():
        raise StoreError(f"{ledger}: there is no ledger")
    return ACTIONS[action][0](ledger, remove)


def _inventory(ledger: Path, remove: bool) -> Said:
    lines = []
    table = inventory(ledger)
    for row in table.iter_rows(named=True):
        lines += [
            f"model {row['model_id'][:12]}, numerics {row['numerics_id'][:12]}: "
            f"{row['checkpoint']} by {row['engine']}, {row['body_dtype']}, {row['device_class']}",
            f"  {row['sequences']:,} sequences, {row['tokens']:,} scored tokens, "
            f"{row['bytes'] / _MIB:.1f} MiB in {row['commits']} commits"
            + (f"; {row['extras']:,} extras" if row["extras"] else "")
            + (f"; {row['unscored']} could not be scored" if row["unscored"] else "")
            + (f"; {row['set_aside']} set aside" if row["set_aside"] else ""),
        ]
    total = table.select("sequences", "bytes").sum().row(0)
    lines.append(
        f"{table['model_id'].n_unique()} models in {table.height} ways of scoring, "
        f"{total[0]:,} log-probs of sequences, {total[1] / _MIB:.1f} MiB"
    )
    return lines, True


def _verify(ledger: Path, remove: bool) -> Said:
    faults = verify_ledger(ledger)
    lines = [
        fault.what if str(fault.path) in fault.what else f"{fault.path}: {fault.what}"
        for fault in faults
    ]
    n = len(scorer_directories(ledger))
    if faults:
        lines.append(f"{len(faults)} faults in the ledger of {n} ways of scoring")
    else:
        lines.append(f"{n} ways of scoring, every byte is as it was committed")
    return lines, not faults


def _compact(ledger: Path, remove: bool) -> Said:
    lines = []
    for directory in scorer_directories(ledger):
        done = compact(directory)
        lines.append(f"{directory}: {done.before} commits are now {done.after}")
    return [*lines, "what they replace is there until `logratio ledger gc --remove`"], True


def _gc(ledger: Path, remove: bool) -> Said:
    garbage = collect(ledger, remove=remove)
    lines = [] if remove else [f"{one.path}: {one.why}" for one in garbage]
    sizes: dict[str, list[int]] = defaultdict(list)
    for one in garbage:
        sizes[one.why].append(one.n_bytes)
    lines += [
        f"{why}: {len(found)} files, {sum(found) / _MIB:.1f} MiB"
        for why, found in sorted(sizes.items())
    ]
    done = "files removed" if remove else "files would be removed with --remove"
    return [*lines, f"{len(garbage)} {done}"], True


ACTIONS: dict[str, tuple[Callable[[Path, bool], Said], str]] = {
    "inventory": (_inventory, "the models, ways of scoring, rows, tokens and bytes in it"),
    "verify": (_verify, "read every byte and name what is damaged"),
    "compact": (_compact, "merge small commits; no number changes"),
    "gc": (_gc, "name what nobody refers to, or remove it"),
}
"""Action to what does it (given the ledger and whether to remove) and what is said of it."""
