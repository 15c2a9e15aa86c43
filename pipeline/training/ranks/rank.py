"""One process of several that train a policy: `python -m pipeline.training.ranks.rank FOLDER`.

torchrun starts it. It makes the job out of the tables as the process that asked did, and trains;
the first of them writes.
"""

import json
import logging
import os
import sys
import threading
from pathlib import Path

from pipeline.errors import TrainingError
from pipeline.names import store_of
from pipeline.plan import Plan
from pipeline.training.objective import prepare, train_prepared
from pipeline.training.policy import PolicyResult
from pipeline.training.ranks.errors import write_error


def main(folder: Path) -> None:
    """Train what the folder asks for; what goes wrong is written there."""
    threading.Thread(target=_end_with_asker, daemon=True).start()
    rank = int(os.environ["RANK"])
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        asked = json.loads((folder / "asked.json").read_text())
        _train(Plan.model_validate(asked["plan"]), asked["objective"], asked["policy_id"])
    except BaseException as error:
        write_error(folder, rank, error)
        # At once: taking the process group down would wait for the others.
        os._exit(1)


def _train(plan: Plan, name: str, policy_id: str) -> None:
    # All is scored; scoring anew to test it was the asker's.
    scoring = plan.scoring.model_copy(update={"null_test": "when_scored"})
    plan = plan.model_copy(update={"scoring": scoring})
    store = store_of(plan)
    prepared = prepare(plan, store, name)
    if isinstance(prepared, PolicyResult) or prepared.policy_id != policy_id:
        raise TrainingError(
            f"before step 1: objective '{name}' is policy {prepared.policy_id} by the tables that "
            f"are there now, and {policy_id} was asked for: they were published anew meanwhile"
        )
    train_prepared(store, prepared)


def _end_with_asker() -> None:
    """The asker holds the other end of standard input, and writes nothing."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
