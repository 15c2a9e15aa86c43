"""The loss landscape: every number against plain Python over the paper's formula, row by row."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from papers import FORMULAS, SCORES, exact, slope

from pipeline.landscape import answerable, landscape, landscape_png
from pipeline.landscape.compute import CHUNK_ROWS
from pipeline.losses import REGISTRY, LossInputError, weighted_sum
from schemas import LossLandscape

SIDES = ("chosen", "rejected")
GRID = {"beta": [0.02, 3.0], "gamma": [0.3, 1.4], "tau": [0.2], "label_smoothing": [0.1]}


def table(n: int = 60, seed: int = 0) -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    columns: dict[str, Any] = {"pair_id": [str(i) for i in range(n)]}
    for side, learnt in zip(SIDES, (1.0, -2.0), strict=True):
        tokens = generator.integers(2, 60, n)
        reference = -tokens * generator.gamma(4.0, 0.25, n)
        moved = generator.normal(learnt, 3.0, n)
        columns |= {
            f"n_{side}": tokens,
            f"ref_{side}": reference,
            f"policy_{side}": np.minimum(reference + moved, -0.1),
        }
    return pl.DataFrame(columns)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    pair = {f"n_{side}": float(row[f"n_{side}"]) for side in SIDES}
    pair |= {f"policy_{side}": row[f"policy_{side}"] for side in SIDES}
    return pair | {f"reference_{side}": row[f"ref_{side}"] for side in SIDES}


def by_hand(name: str, values: dict[str, float], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean loss, weights and what follows from them, of the formulas in 80 digits."""
    losses, weights = [], []
    for row in [*rows, None]:
        if row is None:  # a pair at rest
            one = dict.fromkeys(
                [f"{model}_{side}" for model in ("policy", "reference") for side in SIDES], -1.0
            )
            pair = {**one, "n_chosen": 1.0, "n_rejected": 1.0, "kl": 0.0}
        else:
            pair = {**numbers(row), "kl": 0.7}
        pair |= values
        losses.append(exact(FORMULAS[name], pair))
        pulls = [
            abs(slope(FORMULAS[name], pair, f"policy_{side}"))
            / slope(lambda x, s=side: SCORES[name](x, s), pair, f"policy_{side}")  # type: ignore[misc]
            for side in SIDES
        ]
        weights.append(sum(pulls) / 2)
    *weights, rest = weights
    n, total = len(weights), math.fsum(weights)
    ranked = sorted(weights)
    return {
        "mean_loss": math.fsum(losses[:-1]) / n,
        "weight_mean": total / n,
        "weight_max": ranked[-1],
        **{
            f"weight_p{percent:02}": ranked[math.ceil(percent / 100 * n) - 1]
            for percent in (5, 25, 50, 75, 95)
        },
        "effective_pairs": total**2 / math.fsum(w * w for w in weights),
        "saturated_share": sum(w < 0.01 * rest for w in weights) / n,
    }


ASKED = (
    "dpo",
    "ipo",
    "ipo_mean",
    "simpo",
    "kto",
    "apo_down",
    "orpo",
    "discopop",
    "cdpo",
    "alphapo",
)


def test_every_number_is_the_formulas() -> None:
    frame = table()
    found = landscape(frame, ASKED, GRID, statistics={"kl": 0.7}, threads=2)
    assert found["loss"].unique(maintain_order=True).to_list() == list(ASKED)
    assert found.group_by("loss").len().sort("loss").rows() == sorted(
        [
            *((name, 2) for name in ASKED if name not in ("simpo", "alphapo")),
            *(("simpo", 4), ("alphapo", 4)),
        ]
    )
    assert found["saturated_share"].n_unique() > 3, "control: it is not one number"
    rows = frame.to_dicts()
    for asked in found.to_dicts():
        values = dict(part.split("=") for part in asked["values"].split())
        own = {key: float(value) for key, value in values.items()}
        assert own.keys() == REGISTRY[asked["loss"]].parameters.keys()
        for key in GRID:
            assert asked[key] == own.get(key)
        expected = by_hand(asked["loss"], own, rows)
        for key, number in expected.items():
            assert asked[key] == pytest.approx(number, rel=1e-9), (asked["loss"], key)
        assert asked["n_pairs"] == frame.height
        assert asked["effective_share"] == pytest.approx(asked["effective_pairs"] / frame.height)


def test_a_table_of_many_chunks_is_its_rows() -> None:
    """More rows than a chunk: the same row twice over changes no share, whatever the threads."""
    small = table(CHUNK_ROWS - 7)
    large = pl.concat([small] * 3)
    names = answerable(small.columns, ["kl"])
    grid = {"beta": [0.1]}
    one = landscape(small, names, grid, statistics={"kl": 0.7}, threads=1)
    three = landscape(large.lazy(), names, grid, statistics={"kl": 0.7}, threads=2)
    assert three["n_pairs"].to_list() == [3 * small.height] * len(names)
    shares = ("mean_loss", "weight_mean", "weight_p50", "effective_share", "saturated_share")
    for column in shares:
        for name, a, b in zip(names, one[column], three[column], strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-12), (name, column)
    again = landscape(large, names, grid, statistics={"kl": 0.7}, threads=1)
    assert again.equals(three), "to the bit"


def test_what_a_table_can_answer_depends_on_its_columns() -> None:
    plain = set(answerable(table().columns))
    assert {"dpo", "simpo", "aot", "bco_pair"} <= plain
    assert not {"kto", "rpo_sq", "wpo", "ld_dpo", "tdpo1"} & plain
    assert set(answerable(table().columns, ["kl"])) - plain == {"kto"}
    with_strength = table().with_columns(strength=pl.lit(2.0))
    assert {"rpo_sq", "odpo"} <= set(answerable(with_strength.columns))
    more = {f"alignment_{side}": pl.lit(-0.5) for side in SIDES}
    found = landscape(table().with_columns(**more), ["wpo", "dpo"], {})
    weighted, plain_dpo = found["weight_mean"]
    assert weighted == pytest.approx(math.exp(-1.0) * plain_dpo)
    without_reference = table().drop("ref_chosen", "ref_rejected")
    assert set(answerable(without_reference.columns)) >= {"simpo", "cpo", "orpo"}
    assert "dpo" not in answerable(without_reference.columns)
    assert landscape(without_reference, ["simpo"], {}).height == 1


def test_a_sum_of_ones_own_is_asked_too() -> None:
    both = weighted_sum({"dpo": REGISTRY["dpo"], "nll_mean": REGISTRY["nll_mean"]})
    found = landscape(table(), [both, "dpo", "nll_mean"], {"dpo.beta": [0.1], "beta": [0.1]})
    assert found["mean_loss"][0] == pytest.approx(found["mean_loss"][1] + found["mean_loss"][2])


@pytest.mark.parametrize(
    ("losses", "grid", "says"),
    [
        (["ddpo"], {}, "'ddpo' is not one of dpo"),
        (["dpo"], {"gama": [1.0]}, "none of the losses has the parameter 'gama'"),
        (["dpo"], {"beta": [-1.0]}, "beta -1.0 is outside its bounds: 0.1, > 0"),
        (["kto"], {}, "kto needs the statistic kl"),
        (["rpo_sq"], {}, "rpo_sq needs the column strength, which the table has not"),
        (["ld_dpo"], {}, "policy_prefix_chosen"),
    ],
)
def test_what_cannot_be_asked_is_refused(losses: list[str], grid: Any, says: str) -> None:
    with pytest.raises(LossInputError) as caught:
        landscape(table(), losses, grid)
    assert says in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_number_that_is_none_is_named(bad: float | None) -> None:
    spoilt = table().with_columns(
        policy_chosen=pl.when(pl.col("pair_id") == "3")
        .then(pl.lit(bad, pl.Float64))
        .otherwise("policy_chosen")
    )
    with pytest.raises(LossInputError, match="policy_chosen: not every row"):
        landscape(spoilt, ["dpo"], {})


def test_an_empty_table_has_no_rows_and_a_full_one_keeps_the_schema() -> None:
    ids = {"policy": "p", "policy_id": "0" * 32, "rewards_digest": "d"}
    empty = landscape(table().clear(), ["dpo"], {})
    assert empty.is_empty()
    full = landscape(table(), ["dpo", "nll_sum"], {"beta": [0.1, 1.0]})
    for found in (empty, full):
        made = found.select(*(pl.lit(v).alias(k) for k, v in ids.items()), pl.all())
        LossLandscape.validate(made)


def test_the_picture_is_a_png_whatever_was_asked(tmp_path: Path) -> None:
    ids = {"policy": "p", "policy_id": "0" * 32, "rewards_digest": "d"}
    found = landscape(table(), ["dpo", "nll_sum"], {"beta": [0.1, 1.0]})
    made = found.select(*(pl.lit(v).alias(k) for k, v in ids.items()), pl.all())
    for losses in (["dpo", "ipo"], ["nll_sum"], []):
        assert landscape_png(made, losses).startswith(b"\x89PNG")
    assert landscape_png(made, ["dpo"]) == landscape_png(made, ["dpo"])
    assert os.listdir(tmp_path) == []
