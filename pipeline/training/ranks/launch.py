"""torchrun, in a process of its own: `python -m pipeline.training.ranks.launch FOLDER N MODULE`.

It is torchrun by its own functions rather than by its command, for the exit codes: of a process
that was killed it only prints who it was.
"""

import logging
import sys
from pathlib import Path

from pipeline.training.ranks.errors import write_ended


def main(folder: str, n: str, module: str) -> int:
    """Run N processes of a module on this machine; 0 if all ended well."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable()  # of torchrun's words about errors: they are raised where it was started
    arguments = ["--standalone", "--nproc-per-node", n, "--local-addr", "127.0.0.1"]
    arguments += ["--log-dir", str(Path(folder) / "logs")]
    arguments += redirects(int(n))
    try:
        run(parse_args([*arguments, "-m", module, folder]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        write_ended(Path(folder), codes)
        return 1
    return 0


def redirects(n: int) -> list[str]:
    """Send what all but the first print to files: it would be said twice.

    torchrun knows ranks of one digit here; of more than ten processes all are redirected.
    """
    if n == 1:
        return []
    return ["--redirects", "3" if n > 10 else ",".join(f"{rank}:3" for rank in range(1, n))]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
