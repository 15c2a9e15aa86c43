"""Frames of pairs or labels to rows of `sequences` and the ways to them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandera.polars as pa
import polars as pl
import pyarrow

from pipeline.ids import Canonical, content_id
from pipeline.plan import TokenizationConfig
from pipeline.tokenization import replies
from pipeline.tokenization.ahead import ahead
from pipeline.tokenization.encoder import Encoder
from pipeline.tokenization.errors import PairError
from pipeline.tokenization.replies import Prompt, Reply
from schemas import (
    LabelSequence,
    PairSequence,
    Sequence,
    UntokenizedLabel,
    UntokenizedPair,
    polars_schema,
)

_BATCH_ROWS = 512
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Rows:
    """What kind of rows is tokenised: its id's column, its replies' columns, its two tables."""

    key: str
    replies: tuple[str, ...]
    ways: tuple[str, ...]
    way_table: type[pa.DataFrameModel]
    lost_table: type[pa.DataFrameModel]


PAIRS = Rows(
    "pair_id", ("chosen", "rejected"), ("chosen_id", "rejected_id"), PairSequence, UntokenizedPair
)
LABELS = Rows("label_id", ("completion",), ("sequence_id",), LabelSequence, UntokenizedLabel)


@dataclass(frozen=True)
class Tokenized:
    """The tables of some rows; a sequence may be in it twice, cut to be what it is and not."""

    sequences: pl.DataFrame
    ways: pl.DataFrame
    lost: pl.DataFrame


def tokenized(frames: Iterable[pl.DataFrame], encoder: Encoder, rows: Rows) -> Iterator[Tokenized]:
    """Tokenise frame by frame; rendering and encoding go ahead in threads of their own."""

    def rendered() -> Iterator[tuple[pl.DataFrame, replies.Batch]]:
        for frame in frames:
            for part in _batches(frame, rows):
                said = [part[side].to_list() for side in rows.replies]
                batch = replies.gather(part["prompt"].to_list(), said, encoder)
                replies.render(batch[0], encoder)
                yield part, batch

    def encoded() -> Iterator[tuple[pl.DataFrame, replies.Batch]]:
        with ahead(rendered()) as batches:
            for part, batch in batches:
                replies.encode(batch[0], encoder)
                yield part, batch

    tokenization_id = encoder.identity()["tokenization_id"][0]
    with ahead(encoded()) as batches:
        for part, (_, found) in batches:
            yield _tables(part, found, encoder, rows, tokenization_id)


def sequence_id(prompt: np.ndarray, completion: np.ndarray, spans: list[tuple[int, int]]) -> str:
    """The id of (prompt ids, completion ids, scored spans), whatever tokenised them."""
    return content_id("sequence", prompt, completion, spans)


def _batches(frame: pl.DataFrame, rows: Rows) -> Iterator[pl.DataFrame]:
    """Parts of a frame of so many rows and so much text at most (or of one row)."""
    said = pl.col("prompt").list.eval(pl.element().struct.field("content").str.len_bytes())
    sizes = frame.select(
        pl.sum_horizontal(said.list.sum(), *[pl.col(side).str.len_bytes() for side in rows.replies])
    ).to_series()
    begin, held = 0, 0
    for end, size in enumerate(sizes.to_list()):
        if end > begin and (end - begin == _BATCH_ROWS or held + size > _BATCH_CHARACTERS):
            yield frame[begin:end]
            begin, held = end, 0
        held += size
    if begin < frame.height:
        yield frame[begin:]


def _tables(
    part: pl.DataFrame,
    found: list[tuple[Prompt, list[Reply]]],
    encoder: Encoder,
    rows: Rows,
    tokenization_id: str,
) -> Tokenized:
    sequences: dict[tuple[str, bool], _Sequence] = {}
    ways, lost = [], []
    keys = part[rows.key].to_list()
    for row, (prompt, said) in enumerate(found):
        try:
            made = _made(prompt, said, encoder, rows.replies)
        except PairError as error:
            place = part.row(row, named=True)
            kept = {key: place[key] for key in (rows.key, "file", "row", "byte_offset")}
            why = {"rule": error.rule, "detail": error.detail}
            lost.append({"tokenization_id": tokenization_id, **kept, **why})
            continue
        for sequence in made:
            sequences.setdefault((sequence.identifier, sequence.truncated), sequence)
        ways.append(
            (
                tokenization_id,
                keys[row],
                *[sequence.identifier for sequence in made],
                any(reply.boundary_merge for reply in said),
                prompt.n_controls + sum(reply.n_controls for reply in said),
            )
        )
    return Tokenized(
        _sequences(list(sequences.values())),
        pl.DataFrame(ways, polars_schema(rows.way_table), orient="row"),
        pl.DataFrame(lost, polars_schema(rows.lost_table)),
    )


@dataclass(slots=True)
class _Sequence:
    identifier: str
    prompt: np.ndarray
    completion: np.ndarray
    truncated: bool


def _made(
    prompt: Prompt, said: list[Reply], encoder: Encoder, sides: tuple[str, ...]
) -> list[_Sequence]:
    """A row's sequences.

    Raises:
        PairError: why it has none.
    """
    prompt_ids = prompt.checked()
    made = [
        _sequence(prompt, prompt_ids, encoder.with_tail(reply.checked(side)), encoder.config, side)
        for reply, side in zip(said, sides, strict=True)
    ]
    controls = prompt.n_controls + sum(reply.n_controls for reply in said)
    if encoder.config.control_tokens == "reject" and controls:
        raise PairError("control_tokens", f"{controls} control strings stand in the text")
    if len({sequence.identifier for sequence in made}) < len(made):
        raise PairError("identical_tokens", "the two replies have the same token ids")
    return made


def _sequence(
    prompt: Prompt,
    prompt_ids: np.ndarray,
    completion: np.ndarray,
    config: TokenizationConfig,
    side: str,
) -> _Sequence:
    length = len(prompt_ids) + len(completion)
    truncated = length > config.max_length
    if truncated:
        if config.over_long == "quarantine":
            raise PairError(
                "over_long", f"{side}: {length} tokens, max_length is {config.max_length}"
            )
        completion = completion[: max(0, config.max_length - len(prompt_ids))]
    if not len(completion):
        raise PairError("nothing_to_score", f"{side}: no completion token within max_length")
    if prompt.form is None:  # for all its replies
        prompt.form = Canonical(prompt_ids)
    identifier = content_id("sequence", prompt.form, completion, [(0, len(completion))])
    return _Sequence(identifier, prompt_ids, completion, truncated)


def _sequences(rows: list[_Sequence]) -> pl.DataFrame:
    """The rows as `schemas.Sequence`, by way of Arrow's buffers: no list of ids in Python."""
    prompts, completions = [row.prompt for row in rows], [row.completion for row in rows]
    n_scored = np.fromiter(map(len, completions), np.int32, len(rows))
    span = pyarrow.StructArray.from_arrays(
        [pyarrow.array(np.zeros_like(n_scored)), pyarrow.array(n_scored)], ["start", "end"]
    )
    table = pyarrow.table(
        {
            "sequence_id": [row.identifier for row in rows],
            "prompt_ids": _lists(prompts),
            "completion_ids": _lists(completions),
            "spans": pyarrow.LargeListArray.from_arrays(np.arange(len(rows) + 1), span),
            "n_prompt": np.fromiter(map(len, prompts), np.int64, len(rows)),
            "n_scored": n_scored.astype(np.int64),
            "truncated": np.fromiter((row.truncated for row in rows), np.bool_, len(rows)),
        }
    )
    frame = pl.from_arrow(table, schema=polars_schema(Sequence))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _lists(arrays: list[np.ndarray]) -> pyarrow.LargeListArray:
    edges = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return pyarrow.LargeListArray.from_arrays(edges, pyarrow.array(values))
