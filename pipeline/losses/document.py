"""The page of all losses, made from the registry: `python -m pipeline.losses.document FILE`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.losses import NEEDS, NOT_YET, REGISTRY, LossSpec

_HEAD = """\
# The losses

Made from the registry by `python -m pipeline.losses.document docs/losses.md`; a test holds it to
the code.

A plan names a loss and sets its parameters (`{loss: dpo, beta: 0.1, …}`); what it leaves out has
the default here. A weighted sum is a map of names to weights, `{loss: {dpo: 1.0, nll_mean: 0.2}}`
with `beta: 0.1` beside it, and a term's own values may stand with its weight, `{simpo: {weight:
0.2, beta: 2.0}}`. An NLL term is a loss like any other: `nll_sum` counts a reply by its sum,
`nll_mean` by its mean per token, `nll_token_mean` every token of the batch alike.

`s` is a reply's score in the loss's own scale, `m = s_w - s_l` the margin of the chosen (`w`) and
the rejected one (`l`), `σ'` is `σ(x) σ(-x)`, `h` the margin of log-ratios in nats. Log-probs are
sums over a reply's scored tokens, its end-of-turn included; means are per such token. A gradient
is dLoss/ds of the chosen reply, and its opposite of the rejected one, unless both are given. The
target is the margin where the loss rests at its defaults (SimPO's: that it asks for). The scope
is what a pair's loss depends on: the pair, or all of its optimiser step, however that is cut.
"""


def page() -> str:
    """The page, as Markdown."""
    return "\n".join([_HEAD, *_table(), "", *_needs(), "", *_papers(), "", *_not_yet()]) + "\n"


def _table() -> Iterator[str]:
    head = ("loss", "formula", "gradient", "scale", "parameters", "needs", "scope", "target")
    yield _row(*head)
    yield _row(*["---"] * len(head))
    for spec in REGISTRY.values():
        target = spec.target(spec.defaults)
        yield _row(
            f"`{spec.name}`",
            spec.formula,
            spec.gradient,
            spec.scale.name,
            "; ".join(f"`{name}` {bounds}" for name, bounds in spec.parameters.items()) or "–",
            ", ".join(spec.needs) or "–",
            spec.scope,
            "–" if target is None else str(target),
        )


def _needs() -> Iterator[str]:
    yield "## What they need"
    yield ""
    yield "Beside the policy's sums. What training cannot give yet, a table may bring."
    yield ""
    yield _row("need", "what", "columns of a table", "trained")
    yield _row(*["---"] * 4)
    for name, need in NEEDS.items():
        columns = ", ".join(f"`{column}`" for column in need.columns) or "–"
        yield _row(name, need.what, columns, "yes" if need.trained else "not yet")
    yield ""
    yield (
        "`batch`: a pair's loss depends on the others of its optimiser step (of its table, for a "
        "landscape); the numbers do not depend on how a step is cut into passes."
    )


def _papers() -> Iterator[str]:
    yield "## Where they come from"
    yield ""
    yield _row("loss", "paper", "defined for")
    yield _row(*["---"] * 3)
    for spec in REGISTRY.values():
        yield _row(f"`{spec.name}`", spec.paper, _domain(spec))


def _domain(spec: LossSpec) -> str:
    return spec.domain or "all log-probs"


def _not_yet() -> Iterator[str]:
    yield "## Not yet"
    yield ""
    for name, why in NOT_YET.items():
        yield f"- {name}: {why}."


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
