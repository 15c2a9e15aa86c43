"""What a report is made of, brought into one order so that equal tables give equal bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import polars as pl

from pipeline.errors import LogratioError


class ReportError(LogratioError):
    """The tables given to a report do not belong together."""


@dataclass(frozen=True)
class ReportInput:
    """Everything a report shows; the order of rows in the frames does not matter.

    Attributes:
        title: heading of the page.
        plan: name of the plan.
        objective: name of the objective in the plan.
        loss: what the policy was trained with, as text, for instance name and beta; empty where
            that is not known.
        rewards: `schemas.Reward` of one policy and one beta.
        pairs: `schemas.PreferencePair`, at least the pairs in `rewards`.
        rows: `schemas.InputRow`.
        quarantine: `schemas.QuarantinedRow`.
        untokenized: `schemas.UntokenizedPair`.
        training_steps: `schemas.TrainingStep`; empty for a policy trained elsewhere.
        training_pairs: `schemas.PreferencePair`, what the plan trains on; the classifier among the
            baselines is fitted on them.
        provenance: what identifies the run, as text.
        noise_floor: the largest difference, in nats, between two log-probs of one sequence scored
            in other batches; None when it was not measured.
        has_reference: whether the loss has one; the rewards always have.
        n_left_out: pairs the plan leaves out on purpose (`limit_pairs`).
    """

    title: str
    plan: str
    objective: str
    loss: Mapping[str, str]
    rewards: pl.DataFrame
    pairs: pl.DataFrame
    rows: pl.DataFrame
    quarantine: pl.DataFrame
    untokenized: pl.DataFrame
    training_steps: pl.DataFrame
    training_pairs: pl.DataFrame
    provenance: Mapping[str, str]
    noise_floor: float | None
    has_reference: bool = True
    n_left_out: int = 0


def ordered(inp: ReportInput) -> ReportInput:
    """The same input with every frame in the order of its keys.

    Raises:
        ReportError: the rewards are of several policies or betas, or of pairs that `pairs` does
            not hold; a pair occurs twice; the noise floor is not a number of nats.
    """
    for column in ("policy_id", "beta"):
        if inp.rewards[column].n_unique() > 1:
            raise ReportError(
                f"the rewards have several values of {column}; report them one by one"
            )
    for name, frame in (("rewards", inp.rewards), ("pairs", inp.pairs)):
        if frame["pair_id"].n_unique() != frame.height:
            raise ReportError(f"a pair stands in {name} twice")
    unknown = inp.rewards.join(inp.pairs, on="pair_id", how="anti").height
    if unknown:
        raise ReportError(f"{unknown} pairs in the rewards are not in the pairs given with them")
    floor = inp.noise_floor
    if floor is not None and not (math.isfinite(floor) and floor >= 0):
        raise ReportError(f"the noise floor must be a number of nats, not {floor}")
    return replace(
        inp,
        rewards=inp.rewards.sort("pair_id"),
        pairs=inp.pairs.sort("pair_id"),
        rows=inp.rows.sort("source", "file", "row", "byte_offset", "disposition"),
        quarantine=inp.quarantine.sort(
            "source", "file", "row", "unit", "byte_offset", "rule", "detail", "raw"
        ),
        untokenized=inp.untokenized.sort("file", "row", "pair_id"),
        training_steps=inp.training_steps.sort("step"),
        training_pairs=inp.training_pairs.sort("pair_id"),
    )


def finite_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows whose every float is a finite number (Polars holds NaN > 0 to be true).

    A noise floor that was not measured is null.
    """
    floats = [n for n, dtype in frame.schema.items() if dtype.is_float() and n != "noise_floor"]
    if not floats:
        return frame
    return frame.filter(
        pl.all_horizontal(pl.col(name).is_finite().fill_null(value=False) for name in floats)
    )
