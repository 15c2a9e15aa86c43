"""Rounds: objectives whose reference or start is another objective's policy."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from pipeline.plan.faults import fault
from pipeline.plan.objective import ObjectiveConfig


def rounds(objectives: Mapping[str, ObjectiveConfig]) -> list[list[str]]:
    """Objectives in rounds, each after those whose policies it needs; else in the plan's order.

    Raises:
        pydantic_core.PydanticCustomError: they need each other in a circle; names it.
    """
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for name, objective in objectives.items():
        sorter.add(name, *(base for base in _needs(objective).values() if base in objectives))
    try:
        sorter.prepare()
    except CycleError as error:
        circle = error.args[1][::-1]  # each now needs the next
        needs = _needs(objectives[circle[0]])
        role = "start" if needs["start"] == circle[1] else "reference"
        raise fault(
            f"objectives.{circle[0]}.{role}",
            f"goes round in a circle, {' -> '.join(circle)}: a policy that is another's reference "
            "or start is trained before it",
        ) from None
    order = list(objectives)
    found = []
    while sorter.is_active():
        found.append(sorted(sorter.get_ready(), key=order.index))
        sorter.done(*found[-1])
    return found


def bases(objectives: Mapping[str, ObjectiveConfig]) -> set[str]:
    """The objectives whose policy is another's reference or start."""
    needed = {base for objective in objectives.values() for base in _needs(objective).values()}
    return needed & objectives.keys()


def _needs(objective: ObjectiveConfig) -> dict[str, str]:
    return {"reference": objective.reference, "start": objective.start}
