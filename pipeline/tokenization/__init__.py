"""Messages to token ids, as at inference.

The prompt's ids are those of the prompt rendered with its generation prompt; the completion's are
those of the rest of the rendered conversation, encoded by itself. Both sides of a pair therefore
share exactly one prompt, and no token straddles the boundary.
"""

from pipeline.tokenization.definition import control_strings, require_same_tokenizer
from pipeline.tokenization.encoder import VERSION, Encoder
from pipeline.tokenization.errors import PairError
from pipeline.tokenization.run import (
    LabelTables,
    SequenceTables,
    Ways,
    label_ways,
    pair_ways,
    tokenize_labels,
    tokenize_pairs,
)
from pipeline.tokenization.sorting import SortedRows, sorted_rows
from pipeline.tokenization.tables import sequence_id

__all__ = [
    "VERSION",
    "Encoder",
    "LabelTables",
    "PairError",
    "SequenceTables",
    "SortedRows",
    "Ways",
    "control_strings",
    "label_ways",
    "pair_ways",
    "require_same_tokenizer",
    "sequence_id",
    "sorted_rows",
    "tokenize_labels",
    "tokenize_pairs",
]
