"""The ledger: every log-prob ever computed, once, under the identity of what computed it.

    <ledger>/<model_id>/<numerics_id>/logprobs/<hash>.parquet
                                      token_logprobs/<hash>.parquet
                                      extras/<hash>.parquet, token_extras/<hash>.parquet
                                      unscored/<hash>.parquet
                                      manifest/<number>.json
                                      set_aside/, trust/, differences/, lock

A commit writes part files and then a manifest that names them with size and hash; a part no
manifest names does not exist. Manifest numbers order the commits: of two values for one sequence,
the first committed wins, for ever. What is damaged is set aside and so scored again. Writers and
readers wait for nobody; only the collection of garbage waits for commits in flight.
"""

from pipeline.scoring.ledger.collection import Garbage, collect
from pipeline.scoring.ledger.commits import (
    ScorerKey,
    append,
    read_complete,
    read_extras,
    read_logprobs,
    read_token_extras,
    read_token_logprobs,
    read_unscored,
    scorer_directories,
    scorers,
)
from pipeline.scoring.ledger.compaction import Compacted, compact
from pipeline.scoring.ledger.contents import Fault, inventory, verify_ledger
from pipeline.scoring.ledger.differences import (
    Difference,
    other_numerics,
    record_differences,
    recorded_difference,
)
from pipeline.scoring.ledger.trust import last_trust, record_trust

__all__ = [
    "Compacted",
    "Difference",
    "Fault",
    "Garbage",
    "ScorerKey",
    "append",
    "collect",
    "compact",
    "inventory",
    "last_trust",
    "other_numerics",
    "read_complete",
    "read_extras",
    "read_logprobs",
    "read_token_extras",
    "read_token_logprobs",
    "read_unscored",
    "record_differences",
    "record_trust",
    "recorded_difference",
    "scorer_directories",
    "scorers",
    "verify_ledger",
]
