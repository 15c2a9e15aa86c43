"""Rules over the units of a prompt together: rivals, contradictions, cycles, ties, duplicates."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.intake.prompts.near import shares_grams, spoken
from pipeline.intake.prompts.splits import splits_of
from pipeline.intake.rows.contract import REJECTED_SCHEMA, apply_contract
from pipeline.intake.rows.units import CANDIDATE, PAIR, unit_frame
from pipeline.plan import SplitConfig
from pipeline.rules import RULES, Action
from pipeline.sources import Candidate, ReadOptions, RowError, pair

FATE_SCHEMA = pl.Schema(
    {
        "ordinal": pl.UInt64(),
        "unit": pl.UInt32(),
        "kind": pl.UInt8(),
        "counted": pl.Boolean(),
        "first": pl.Boolean(),
        "id": pl.Binary(),
    }
)
"""A row's part in an accepted unit. `counted` is false for the row of a pair's rejected reply, if
it is another row than the chosen one's; `first` says that the unit was not read before; `id` is the
pair's or label's, 16 bytes."""


@dataclass(frozen=True)
class Setting:
    """What rules over a prompt's units depend on.

    Attributes:
        split: the held-out share.
        acts: what is done under each rule.
        options: each source's, for how rivals are paired.
        near: ids of training prompts that are near a held-out or evaluation prompt.
        grams: hashes of the evaluation prompts' runs of 10 words (`near.word_grams`), sorted.
    """

    split: SplitConfig
    acts: Mapping[str, Action]
    options: Mapping[str, ReadOptions]
    near: frozenset[str]
    grams: np.ndarray


def judge(units: pl.DataFrame, setting: Setting) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Apply the rules that look at all units of a prompt.

    Args:
        units: all units of whole prompts that kept the contract, with `flags`.
        setting: what to do.

    Returns:
        The units that are left, with `split` and without candidates; and `REJECTED_SCHEMA` rows.
    """
    made, rejected = _rivals(units, setting)
    candidates = units.filter(kind=CANDIDATE).select("ordinal", "unit")
    units = pl.concat([units.filter(pl.col("kind") != CANDIDATE), made]).sort("ordinal", "unit")
    units = units.join(splits_of(units, setting.split), on="prompt_id", maintain_order="left")
    # One rule after the other, since each looks at what the one before has left.
    rules: dict[str, Callable[[pl.DataFrame], pl.Expr | pl.Series]] = {
        "tied": lambda _: pl.col("chosen_score") == pl.col("rejected_score"),
        "contradicted": lambda left: pl.col("reverse_id").is_in(left["unit_id"].implode()),
        "preference_cycle": lambda left: pl.Series(_in_cycle(left), dtype=pl.Boolean),
        "near_eval": lambda _: (
            (pl.col("split") == "train") & pl.col("prompt_id").is_in(list(setting.near))
        ),
        "contaminated": lambda left: pl.Series(
            _contaminated(left, setting.grams), dtype=pl.Boolean
        ),
    }
    broken = [rejected]
    for rule, find in rules.items():
        action = setting.acts[rule]
        if action == "off":
            continue
        units = units.with_columns(hit=find(units)).with_columns(
            pl.col("hit").fill_null(value=False)
        )
        trained = pl.col("split") == "train"
        out = {
            "quarantine": pl.col("hit"),
            "quarantine_train": pl.col("hit") & trained,
        }.get(action, pl.lit(value=False))
        broken.append(
            units.filter(out).select(
                "ordinal", "unit", rule=pl.lit(rule), detail=pl.lit(RULES[rule].what)
            )
        )
        named = pl.col("flags").list.concat(pl.lit([rule], pl.List(pl.String)))
        units = units.filter(~out).with_columns(flags=pl.when("hit").then(named).otherwise("flags"))
        if action == "leave_out":
            left_out = pl.col("hit") & trained
            units = units.with_columns(
                split=pl.when(left_out).then(pl.lit("left_out")).otherwise("split")
            )
        units = units.drop("hit")
    rejected = pl.concat(broken)
    return units, pl.concat([rejected, _unpaired(candidates, units, rejected)])


def merge(units: pl.DataFrame) -> pl.DataFrame:
    """Distinct units, sorted by prompt and id; equal ones become one with votes and sources.

    `strength` is the mean over the votes that give one; `meta` and the place are the first vote's.
    """
    ordered = units.sort("ordinal", "unit")
    return (
        ordered.group_by("kind", "unit_id", maintain_order=True)
        .agg(
            pl.col("prompt_id", "prompt", "chosen", "rejected", "desirable", "meta").first(),
            pl.col("file", "row", "byte_offset", "split").first(),
            sources=pl.col("source").unique().sort(),
            flags=pl.col("flags").explode().drop_nulls().unique().sort(),
            strength=pl.col("strength").sort().mean(),  # sorted: a sum depends on its order
            votes=pl.len().cast(pl.Int64),
        )
        .sort("prompt_id", "unit_id")
    )


def fates(units: pl.DataFrame) -> pl.DataFrame:
    """What accepted units mean for the rows they were read from, as `FATE_SCHEMA`."""
    own = units.sort("ordinal", "unit").select(
        "ordinal",
        "unit",
        "kind",
        counted=pl.lit(value=True),
        first=pl.struct("kind", "unit_id").is_first_distinct(),
        id=pl.col("unit_id").str.decode("hex"),
        rival="rival",
    )
    rivals = own.filter(pl.col("rival").is_not_null()).with_columns(
        ordinal="rival", counted=pl.lit(value=False)
    )
    return pl.concat([own, rivals]).select(list(FATE_SCHEMA)).cast(FATE_SCHEMA)


def _rivals(units: pl.DataFrame, setting: Setting) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs out of candidates with one prompt in one source, and what could not be paired."""
    candidates = units.filter(kind=CANDIDATE)
    if candidates.is_empty():
        return units.clear(), pl.DataFrame(schema=REJECTED_SCHEMA)
    rows = candidates.sort("source", "prompt_id", "ordinal", "unit").to_dicts()
    made, broken = [], []
    for (source, _), group in groupby(rows, key=lambda row: (row["source"], row["prompt_id"])):
        rivals = list(group)
        by_reply = {row["chosen"]: row for row in reversed(rivals)}
        read = pair([_candidate(row) for row in rivals], setting.options.get(source, ReadOptions()))
        for number, unit in enumerate(read):
            if isinstance(unit, RowError):
                broken.append((rivals[0], number, unit))
                continue
            winner, loser = by_reply[unit.chosen], by_reply[unit.rejected]
            place = {name: winner[name] for name in
                     ("ordinal", "source", "file", "row", "byte_offset")}  # fmt: skip
            place |= {
                "unit": number,
                "rival": loser["ordinal"],
                "evaluation": winner["evaluation"] or loser["evaluation"],
            }
            made.append((place, unit))
    kept, rejected = apply_contract(unit_frame(made), setting.acts)
    lone = pl.DataFrame(
        [(row["ordinal"], number, e.rule, e.detail) for row, number, e in broken],
        schema=REJECTED_SCHEMA,
        orient="row",
    )
    return kept, pl.concat([rejected, lone])


def _candidate(row: Mapping[str, Any]) -> Candidate:
    return Candidate(row["prompt"], row["chosen"], row["chosen_score"], json.loads(row["meta"]))


def _in_cycle(units: pl.DataFrame) -> np.ndarray:
    """Whether each unit is a preference between two replies that are in one cycle, bool [n].

    A cycle of two is a contradiction, which is another rule's: both directions are left out.
    """
    result = np.zeros(units.height, bool)
    several = (
        units.with_row_index("place")
        .filter((pl.col("kind") == PAIR) & ~pl.col("reverse_id").is_in(units["unit_id"].implode()))
        .filter(pl.len().over("prompt_id") > 2)
    )
    if several.is_empty():
        return result
    replies = pl.concat(
        [several.select("prompt_id", reply=side) for side in ("chosen", "rejected")]
    ).unique()
    nodes = replies.with_row_index("node")
    ends = [
        several.join(nodes, left_on=["prompt_id", side], right_on=["prompt_id", "reply"],
                     maintain_order="left")["node"].to_numpy()
        for side in ("chosen", "rejected")
    ]  # fmt: skip
    graph = coo_array((np.ones(several.height), (ends[0], ends[1])), shape=(nodes.height,) * 2)
    _, component = connected_components(graph, directed=True, connection="strong")
    result[several["place"].to_numpy()] = component[ends[0]] == component[ends[1]]
    return result


def _unpaired(
    candidates: pl.DataFrame, units: pl.DataFrame, rejected: pl.DataFrame
) -> pl.DataFrame:
    """Candidates whose rows became part of no pair, nor were rejected: each row has its fate."""
    seen = pl.concat([units["ordinal"], units["rival"].drop_nulls(), rejected["ordinal"]])
    return candidates.filter(~pl.col("ordinal").is_in(seen.implode())).select(
        "ordinal", "unit", rule=pl.lit("not_paired"), detail=pl.lit(RULES["not_paired"].what)
    )


def _contaminated(units: pl.DataFrame, grams: np.ndarray) -> np.ndarray:
    """Whether each training unit shares a run of words with an evaluation prompt, bool [n]."""
    if not len(grams):
        return np.zeros(units.height, bool)
    said = units.select(
        "split",
        pl.concat_str(
            [spoken(pl.col("prompt")), "chosen", pl.col("rejected").fill_null("")], separator="\n"
        ),
    )
    return np.array(
        [split == "train" and shares_grams(text, grams) for split, text in said.iter_rows()], bool
    )
