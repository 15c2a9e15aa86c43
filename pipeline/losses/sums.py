"""Weighted sums of losses (MPO, Wang et al. 2024, arXiv 2411.10442; or a loss with an NLL term).

A sum is a loss like any other. Its parameters are its terms', as `<term>.<parameter>`, and each
term's weight, as `<term>.weight`; its scores are its first term's.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.losses.base import LossSpec, Pair, PairBatch, Parameter, Statistics, Target, Values

if TYPE_CHECKING:
    import torch

WEIGHT = Parameter(1.0, above=0)


def weighted_sum(terms: Mapping[str, LossSpec]) -> LossSpec:
    """The loss sum of weight x term, of at least one."""
    lead = next(iter(terms.values()))

    def own(name: str, values: Mapping[str, float]) -> dict[str, float]:
        return {p: values[f"{name}.{p}"] for p in terms[name].parameters}

    def known(name: str, statistics: Statistics) -> dict[str, float]:
        """A term's statistics: those of its own name, and those that all share."""
        shared = {key: value for key, value in statistics.items() if "." not in key}
        mine = {k: v for k, v in statistics.items() if k.startswith(f"{name}.")}
        return {**shared, **{key.partition(".")[2]: value for key, value in mine.items()}}

    def loss(batch: PairBatch, values: Values, statistics: Statistics) -> "torch.Tensor":
        # By name, so that the order in a plan does not show in the last bit.
        first, *rest = (
            values[f"{name}.weight"]
            * terms[name].loss(batch, own(name, values), known(name, statistics))
            for name in sorted(terms)
        )
        for other in rest:
            first = first + other
        return first

    def logprob_slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
        sides = [
            [
                values[f"{name}.weight"] * slope
                for slope in spec.logprob_slopes(batch, own(name, values), known(name, statistics))
            ]
            for name, spec in sorted(terms.items())
        ]
        (chosen, rejected), *rest = sides
        for more_chosen, more_rejected in rest:
            chosen, rejected = chosen + more_chosen, rejected + more_rejected
        return chosen, rejected

    def slopes(batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
        chosen, rejected = logprob_slopes(batch, values, statistics)
        mine = own(lead.name, values)
        return (
            chosen / lead.scale.slope(batch.chosen, mine),
            rejected / lead.scale.slope(batch.rejected, mine),
        )

    def statistic(batch: PairBatch, values: Values, before: Statistics) -> Statistics:
        found: dict[str, float] = {}
        for name, spec in terms.items():
            if spec.statistic is not None:
                of_term = spec.statistic(batch, own(name, values), known(name, before))
                found |= {f"{name}.{key}": value for key, value in of_term.items()}
        return found

    def target(values: Values) -> Target | None:
        return lead.target(own(lead.name, values)) if len(terms) == 1 else None

    scale = lead.scale
    parameters = {
        f"{name}.{parameter}": bounds
        for name, spec in terms.items()
        for parameter, bounds in {"weight": WEIGHT, **spec.parameters}.items()
    }
    return LossSpec(
        name=" + ".join(terms),
        paper="; ".join(dict.fromkeys(spec.paper for spec in terms.values())),
        formula=" + ".join(f"{name}.weight × {name}" for name in terms),
        gradient="the terms'",
        parameters=parameters,
        needs=tuple(dict.fromkeys(need for spec in terms.values() for need in spec.needs)),
        scale=type(scale)(
            scale.name,
            lambda side, values: scale.score(side, own(lead.name, values)),
            lambda side, values: scale.slope(side, own(lead.name, values)),
        ),
        loss=loss,
        slopes=slopes,
        target=target,
        statistic=statistic if any(spec.statistic for spec in terms.values()) else None,
        domain="; ".join(spec.domain for spec in terms.values() if spec.domain),
    )
