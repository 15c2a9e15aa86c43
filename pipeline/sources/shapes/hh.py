r"""HH-RLHF transcripts (Bai et al. 2022, arXiv 2204.05862).

Fields: `chosen` and `rejected`, each a whole transcript of turns that begin with "\n\nHuman:" or
"\n\nAssistant:". Every other field survives in `meta`.
"""

from pipeline.sources.base import Read, ReadOptions, split_reply
from pipeline.sources.fields import preference, text
from pipeline.sources.transcripts import hh_turns

_FIELDS = ("chosen", "rejected")


def read_hh(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one pair; a turn's text is stripped of the white space round it.

    Raises:
        RowError: `missing_field`, `wrong_type`, `not_a_transcript`, `no_reply`, `prompts_differ`.
    """
    chosen, rejected = (hh_turns(text(row, field), field) for field in _FIELDS)
    return [preference(row, split_reply(chosen, rejected), _FIELDS, {})]
