"""The preference losses, by name.

A registry entry says what a loss is and what it needs, so that the plan, the trainer and the
reward table ask it instead of knowing. torch is imported inside the functions only: a plan can
be checked, and a Dagster code location loaded, without it.
"""

from pipeline.losses.base import LossSpec, PairBatch, Statistics, Target, Values
from pipeline.losses.dpo import DPO
from pipeline.losses.ipo import IPO, IPO_MEAN
from pipeline.losses.kto import KTO
from pipeline.losses.lecture import LECTURE_IPO, LECTURE_KTO
from pipeline.losses.simpo import SIMPO

REGISTRY: dict[str, LossSpec] = {
    spec.name: spec for spec in (DPO, IPO, IPO_MEAN, SIMPO, KTO, LECTURE_IPO, LECTURE_KTO)
}

__all__ = ["REGISTRY", "LossSpec", "PairBatch", "Statistics", "Target", "Values"]
