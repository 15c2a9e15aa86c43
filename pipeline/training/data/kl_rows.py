"""Mismatched replies, which KTO's reference point is the mean of (arXiv 2402.01306, section 4.1).

A row of training data is one side of a pair, or a label. Its partner's reply, put under its own
prompt, is a reply nobody gave to that prompt. `ring`: all rows stand on a ring in the order of a
hash of their ids, and the partner is the next one with another prompt, so that an inserted row
disturbs its one neighbour. `batch_rotation` is TRL's: the partner is the row before in the
optimiser step's batch, round the end; labels and the chosen sides of pairs stand first, in the
batch's order, then the pairs' rejected sides.
"""

from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import TrainingError
from pipeline.ids import content_id, unit_interval
from pipeline.plan import TrainingConfig
from pipeline.tokenization import sequence_id
from pipeline.training.data.preferences import Preferences
from pipeline.training.data.schedule import step_ids
from schemas import KlSequence, Sequence, polars_schema

_Row = tuple[str, str]
"""(pair or label id, side)."""

_LENGTH = pl.col("n_prompt") + pl.col("completion_ids").list.len()
"""A sequence's tokens."""


def kl_rows(
    preferences: Preferences,
    sequences: pl.DataFrame,
    *,
    partner: str,
    training: TrainingConfig,
    max_length: int,
) -> pl.DataFrame:
    """The mismatched replies of what is trained on, as `schemas.KlSequence`.

    Args:
        preferences: what the objective reads; the `train` split of it is trained on.
        sequences: `schemas.Sequence`.
        partner: `ring` or `batch_rotation`.
        training: what decides the batches; `ring` does not depend on it.
        max_length: tokens of prompt and reply together; a longer reply loses its end.

    Raises:
        TrainingError: `ring`, and every row has the same prompt.
    """
    trained = preferences.of_splits("train")
    own = _own_sequences(trained)
    if not own:
        return pl.DataFrame(schema=polars_schema(KlSequence))
    tokenization_id, *_ = (
        *trained.pair_sequences["tokenization_id"],
        *trained.label_sequences["tokenization_id"],
    )
    labels = set(trained.labels["label_id"])
    partners: list[tuple[int | None, _Row, _Row]]
    if partner == "ring":
        prompts = dict(trained.pairs.select("pair_id", "prompt_id").iter_rows())
        prompts |= dict(trained.labels.select("label_id", "prompt_id").iter_rows())
        partners = [(None, row, other) for row, other in _ring(list(own), prompts).items()]
    else:
        lengths = dict(sequences.select("sequence_id", _LENGTH).iter_rows())
        n_tokens: dict[str, int] = {}
        sides: dict[str, list[str]] = {}
        for (example, side), sequence in own.items():
            n_tokens[example] = n_tokens.get(example, 0) + lengths[sequence]
            sides.setdefault(example, []).append(side)
        steps = step_ids(n_tokens, training)
        partners = [
            (step, row, other)
            for step, batch in enumerate(steps, start=1)
            for row, other in _rotation(batch, sides).items()
        ]
    ids = {row["sequence_id"]: row for row in sequences.iter_rows(named=True)}
    rows = []
    for step, row, other in partners:
        prompt, reply = ids[own[row]], ids[own[other]]
        n_completion = min(len(reply["completion_ids"]), max_length - prompt["n_prompt"])
        rows.append(
            {
                "tokenization_id": tokenization_id,
                "pair_id": None if row[0] in labels else row[0],
                "label_id": row[0] if row[0] in labels else None,
                "side": row[1],
                "step": step,
                "partner_id": other[0],
                "partner_side": other[1],
                "prompt_of": own[row],
                "completion_of": own[other],
                "n_completion": n_completion,
                "sequence_id": _joined(prompt, reply, n_completion)["sequence_id"],
            }
        )
    table = pl.DataFrame(rows, schema=polars_schema(KlSequence))
    return table.sort("step", "pair_id", "label_id", "side")


def kl_sequences(kl: pl.DataFrame, sequences: pl.DataFrame) -> pl.DataFrame:
    """The sequences behind mismatched replies, each once, as `schemas.Sequence`."""
    ids = {row["sequence_id"]: row for row in sequences.iter_rows(named=True)}
    rows = {
        row["sequence_id"]: _joined(
            ids[row["prompt_of"]], ids[row["completion_of"]], row["n_completion"]
        )
        for row in kl.iter_rows(named=True)
    }
    return pl.DataFrame(list(rows.values()), schema=polars_schema(Sequence)).sort("sequence_id")


def _own_sequences(trained: Preferences) -> dict[_Row, str]:
    """Every row's own sequence, a pair's chosen side before its rejected one."""
    own = {
        (row["pair_id"], side): row[f"{side}_id"]
        for row in trained.pair_sequences.sort("pair_id").iter_rows(named=True)
        for side in ("chosen", "rejected")
    }
    sides = {
        label: "chosen" if desirable else "rejected"
        for label, desirable in trained.labels.select("label_id", "desirable").iter_rows()
    }
    ways = trained.label_sequences.select("label_id", "sequence_id").sort("label_id")
    return {**own, **{(label, sides[label]): sequence for label, sequence in ways.iter_rows()}}


def _ring(rows: list[_Row], prompts: dict[str, str]) -> dict[_Row, _Row]:
    """Each row's next one with another prompt."""
    order = sorted(rows, key=lambda row: (unit_interval(content_id("kl row", *row), "ring"), row))
    partner: dict[_Row, _Row | None] = dict.fromkeys(order)
    # Backwards and twice round, so that a run of rows with one prompt finds its end.
    for i in reversed(range(2 * len(order))):
        row, following = order[i % len(order)], order[(i + 1) % len(order)]
        same = prompts[row[0]] == prompts[following[0]]
        partner[row] = partner[following] if same else following
    found = {row: other for row, other in partner.items() if other is not None}
    if len(found) < len(order):
        raise TrainingError(
            "a loss with a KL term needs replies to two prompts at least, and all pairs and "
            "labels of the split 'train' have the same one"
        )
    return found


def _rotation(batch: list[str], sides: dict[str, list[str]]) -> dict[_Row, _Row]:
    """The row before each, the first ones' sides before the second ones'."""
    rows = [(example, sides[example][0]) for example in batch]
    rows += [(example, side) for example in batch for side in sides[example][1:]]
    return {row: rows[i - 1] for i, row in enumerate(rows)}


def _joined(
    prompt: dict[str, Any], completion: dict[str, Any], n_completion: int
) -> dict[str, Any]:
    """The row of `sequences` for one's prompt and the first `n_completion` tokens of another."""
    prompt_ids = np.asarray(prompt["prompt_ids"], np.int32)
    ids = np.asarray(completion["completion_ids"], np.int32)[:n_completion]
    spans = [
        (span["start"], min(span["end"], len(ids)))
        for span in completion["spans"]
        if span["start"] < len(ids)
    ]
    return {
        "sequence_id": sequence_id(prompt_ids, ids, spans),
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "spans": [{"start": start, "end": end} for start, end in spans],
        "n_prompt": len(prompt_ids),
        "n_scored": sum(end - start for start, end in spans),
        "truncated": len(ids) < len(completion["completion_ids"]),
    }
