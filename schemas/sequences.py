"""Tables of the tokenisation: token ids once per distinct sequence, and the pairs' way to them."""

from typing import ClassVar

import pandera.polars as pa

from schemas.base import ID, SPANS, TOKEN_IDS, Table

SIDES = ["chosen", "rejected"]


class Tokenization(Table):
    """One row is a way of turning messages into token ids; every field is part of its id."""

    tokenization_id: str = pa.Field(unique=True, str_matches=ID)
    tokenizer: str = pa.Field(
        str_matches=ID, description="Digest of the tokeniser's definition and special tokens."
    )
    chat_template: str = pa.Field(description="The Jinja source of the chat template.")
    max_length: int = pa.Field(ge=2, description="Most tokens of prompt and completion together.")
    over_long: str = pa.Field(isin=["quarantine", "keep_start"])
    completion_tail: str = pa.Field(isin=["template", "eos"])
    control_tokens: str = pa.Field(isin=["literal", "allow", "reject"])
    pinned_date: str | None = pa.Field(nullable=True, description="ISO date templates see.")
    version: int = pa.Field(ge=1, description="Raised when the meaning of this table changes.")


class Sequence(Table):
    """One row is a distinct (prompt ids, completion ids, scored spans)."""

    sequence_id: str = pa.Field(unique=True, str_matches=ID)
    prompt_ids: TOKEN_IDS  # type: ignore[valid-type]
    completion_ids: TOKEN_IDS  # type: ignore[valid-type]
    spans: SPANS = pa.Field(  # type: ignore[valid-type]
        description="Half-open ranges of `completion_ids` whose log-probs count."
    )
    n_prompt: int = pa.Field(ge=1)
    n_scored: int = pa.Field(ge=1, description="Scored tokens, the end-of-turn included.")
    truncated: bool


class PairSequence(Table):
    """One row is a pair's way to its two sequences under one tokenisation."""

    tokenization_id: str = pa.Field(str_matches=ID)
    pair_id: str = pa.Field(unique=True, str_matches=ID)
    chosen_id: str = pa.Field(str_matches=ID)
    rejected_id: str = pa.Field(str_matches=ID)
    boundary_merge: bool = pa.Field(
        description="Encoding prompt and completion in one go would give other ids."
    )
    control_tokens: int = pa.Field(
        ge=0, description="Control-token strings found inside the messages' text."
    )


class LabelSequence(Table):
    """One row is a label's way to its sequence under one tokenisation."""

    tokenization_id: str = pa.Field(str_matches=ID)
    label_id: str = pa.Field(unique=True, str_matches=ID)
    sequence_id: str = pa.Field(str_matches=ID)
    boundary_merge: bool = pa.Field(
        description="Encoding prompt and completion in one go would give other ids."
    )
    control_tokens: int = pa.Field(
        ge=0, description="Control-token strings found inside the messages' text."
    )


class KlSequence(Table):
    """One row is a mismatched reply: a row of training data answered by another row's reply.

    A pair is two rows, its chosen and its rejected side; a label is one, on the chosen side where
    it is desirable, else on the rejected one. The mean log-ratio over such replies estimates how
    far a policy is from its reference (KTO's reference point). The sequence itself is the prompt of
    `prompt_of` and the reply of `completion_of`, cut where the two are too long.
    """

    tokenization_id: str = pa.Field(str_matches=ID)
    pair_id: str | None = pa.Field(
        nullable=True, str_matches=ID, description="The row's pair; null for a label."
    )
    label_id: str | None = pa.Field(
        nullable=True, str_matches=ID, description="The row's label; null for a pair's side."
    )
    side: str = pa.Field(isin=SIDES)
    step: int | None = pa.Field(
        nullable=True, ge=1, description="The optimiser step it is for; null for every step."
    )
    partner_id: str = pa.Field(str_matches=ID, description="The pair or label whose reply it is.")
    partner_side: str = pa.Field(isin=SIDES)
    prompt_of: str = pa.Field(str_matches=ID, description="A sequence with the row's prompt.")
    completion_of: str = pa.Field(str_matches=ID, description="The sequence with the reply.")
    n_completion: int = pa.Field(ge=1, description="Tokens of the reply that are left.")
    sequence_id: str = pa.Field(str_matches=ID)

    class Config(Table.Config):
        """A row has one partner in a step."""

        unique: ClassVar[list[str]] = ["pair_id", "label_id", "side", "step"]


class UntokenizedPair(Table):
    """One row is a valid pair that cannot be scored under this tokenisation, and why."""

    tokenization_id: str = pa.Field(str_matches=ID)
    pair_id: str = pa.Field(unique=True, str_matches=ID)
    file: str
    row: int = pa.Field(ge=0)
    byte_offset: int | None = pa.Field(nullable=True, ge=0)
    rule: str
    detail: str


class UntokenizedLabel(Table):
    """One row is a valid label that cannot be scored under this tokenisation, and why."""

    tokenization_id: str = pa.Field(str_matches=ID)
    label_id: str = pa.Field(unique=True, str_matches=ID)
    file: str
    row: int = pa.Field(ge=0)
    byte_offset: int | None = pa.Field(nullable=True, ge=0)
    rule: str
    detail: str
