"""Class weights: the KTO paper's ratio, what is advised, and when."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import prepared

from pipeline.plan import ObjectiveConfig, Plan
from pipeline.stages import train
from pipeline.store import Store
from pipeline.training.data.balance import class_balance
from pipeline.training.data.examples import Example
from pipeline.training.objective import Prepared, prepare

WritePlan = Any
WriteLabels = Callable[..., dict[str, str]]
OF = {"reference": "base", "start": "base"}


def fake(desirable: bool | None) -> Example:
    replies: Any = (None,) if desirable is not None else (None, None)
    return Example("0" * 32, np.array([1], np.int32), replies, (), desirable=desirable)


def weighted(loss: str, **values: float) -> dict[str, float]:
    return ObjectiveConfig.model_validate({"loss": loss, **OF, **values}).values


def test_the_balance_of_classes_is_the_papers_ratio() -> None:
    examples = [fake(True)] * 30 + [fake(False)] * 6 + [fake(None)] * 4
    found = class_balance(examples, weighted("kto", desirable_weight=2.0, undesirable_weight=0.5))
    assert found is not None
    assert (found.n_desirable, found.n_undesirable) == (34, 10)
    assert found.ratio == pytest.approx(2.0 * 34 / (0.5 * 10))
    half = class_balance(
        [replace(e, weight=0.5) if e.desirable else e for e in examples], weighted("kto")
    )
    assert half is not None
    assert half.ratio == pytest.approx((0.5 * 30 + 4) / 10)
    assert class_balance(examples, weighted("dpo")) is None
    of_pairs = class_balance([fake(None)] * 5, weighted("kto"))
    assert of_pairs is not None
    assert (of_pairs.ratio, of_pairs.advice) == (1.0, None)


@pytest.mark.parametrize(("n_liked", "n_disliked"), [(30, 10), (10, 30), (7, 9)])
def test_what_is_advised_is_within_the_papers_bounds(n_liked: int, n_disliked: int) -> None:
    examples = [fake(True)] * n_liked + [fake(False)] * n_disliked
    found = class_balance(examples, weighted("kto", desirable_weight=1.1))
    assert found is not None
    assert found.advice is not None
    numbers = re.findall(r"from ([\d.]+) to ([\d.]+)", found.advice)
    low, high, other_low, other_high = (float(n) for both in numbers for n in both)
    for values in (
        {"desirable_weight": low * 1.01},
        {"desirable_weight": high * 0.99},
        {"desirable_weight": 1.1, "undesirable_weight": other_low * 1.01},
        {"desirable_weight": 1.1, "undesirable_weight": other_high * 0.99},
    ):
        better = class_balance(examples, weighted("kto", **values))
        assert better is not None
        assert better.advice is None, values
    worse = class_balance(examples, weighted("kto", desirable_weight=high * 1.1))
    assert worse is not None
    assert worse.advice is not None, "control: outside them"
    of_bco = class_balance(examples, weighted("bco_unpaired"))
    assert of_bco is not None
    assert of_bco.advice is None, "the bounds are KTO's"


def prepared_with(
    write_plan: WritePlan, write_labels: WriteLabels, objective: dict[str, Any]
) -> tuple[Plan, Store]:
    path = write_plan(
        sources={"labels": write_labels(20)},
        split={"test_share": 0.0},
        objectives={"plain": objective},
    )
    return prepared(path, "training.max_steps=1")


def test_weights_outside_the_papers_bounds_are_warned_of(
    write_plan: WritePlan, write_labels: WriteLabels, caplog: pytest.LogCaptureFixture
) -> None:
    plain: dict[str, Any] = {"loss": "kto", "data": "labels", **OF}
    plan, store = prepared_with(write_plan, write_labels, plain)
    with caplog.at_level(logging.WARNING):
        result = train(plan, store, "plain")
    assert result.balance is not None
    assert (result.balance.n_desirable, result.balance.n_undesirable) == (13, 7)
    assert "objective 'plain': 13 desirable and 7 undesirable rows" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert isinstance(prepare(plan, store, "plain"), Prepared)
    assert "undesirable rows" not in caplog.text, "every process of several prepares"
    even = {**plain, "undesirable_weight": 1.6}
    plan, store = prepared_with(write_plan, write_labels, even)
    with caplog.at_level(logging.WARNING):
        result = train(plan, store, "plain")
    assert result.balance is not None
    assert result.balance.ratio == pytest.approx(13 / (1.6 * 7))
    assert "undesirable rows" not in caplog.text
    one_class = class_balance([fake(True)] * 3, weighted("bco_unpaired"))
    assert one_class is not None
    assert one_class.ratio is None
    assert one_class.advice == "all 3 rows it trains on are desirable"
