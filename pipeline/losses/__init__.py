"""The preference losses, by name.

A registry entry says what a loss is and what it needs, so that the plan, the trainer and the
reward table ask it instead of knowing. torch is imported inside the functions only: a plan can
be checked, and a Dagster code location loaded, without it.
"""

from pipeline.losses.base import LossSpec, PairBatch
from pipeline.losses.dpo import DPO

REGISTRY: dict[str, LossSpec] = {spec.name: spec for spec in (DPO,)}

__all__ = ["REGISTRY", "LossSpec", "PairBatch"]
