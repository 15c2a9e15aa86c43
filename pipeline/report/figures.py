"""The report's figures: static SVG that follows the page's colours, and one PNG.

Equal numbers give equal bytes: no dates, fixed ids, Matplotlib's own defaults whatever the user's
settings. Nothing from the data is drawn but numbers.
"""

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LN2 = math.log(2)
MAX_POINTS = 300
# In the order of a page: what the policy has not seen first.
SPLIT_NAMES = {
    "test": "held-out (test)",
    "evaluation": "evaluation",
    "train": "train",
    "left_out": "left out of training",
}
CURVES = ("loss", "rewards/accuracies", "rewards/margins")

# Colours no data carries, each replaced by what the page's style sheet says, light or dark.
_INK, _FAINT = "#010203", "#010204"
_SERIES = {"train": "#010205", "test": "#010206", "evaluation": "#010207",
           "left_out": "#010208"}  # fmt: skip
_ON_PAGE = {
    _INK: "currentColor",
    _FAINT: "var(--rule, #c8ccd0)",
    _SERIES["train"]: "var(--series-train, #b45309)",
    _SERIES["test"]: "var(--series-test, #0b62a8)",
    _SERIES["evaluation"]: "var(--series-evaluation, #00755b)",
    _SERIES["left_out"]: "var(--series-left-out, #6f5a9e)",
}
# For a bitmap on white; blue and orange stay apart in every common colour blindness.
_ON_WHITE = {
    _INK: "#1f2328",
    _FAINT: "#c8ccd0",
    _SERIES["train"]: "#b45309",
    _SERIES["test"]: "#0b62a8",
    _SERIES["evaluation"]: "#00755b",
    _SERIES["left_out"]: "#6f5a9e",
}
_DASHES = {"train": (0, (4, 2)), "test": "solid", "evaluation": (0, (1, 1.5)),
           "left_out": (0, (6, 2, 1, 2))}  # fmt: skip


class _Look(NamedTuple):
    """Size in inches, and the colour that stands for each role."""

    width: float
    height: float
    colour: Callable[[str], str]


def histogram_svg(histogram: dict[str, Any], *, narrow: bool) -> str:
    """The margin histogram as an `<svg>` element, for a wide page or a phone."""
    look = _Look(4.0, 3.1, str) if narrow else _Look(7.6, 3.0, str)
    with _defaults(f"histogram-{narrow}"):
        return _svg(_histogram(histogram, look), f"h{int(narrow)}")


def histogram_png(histogram: dict[str, Any] | None) -> bytes:
    """The margin histogram as a small PNG on white, for Dagster's metadata."""
    with _defaults("png"):
        look = _Look(6.4, 2.6, _ON_WHITE.__getitem__)
        if histogram is None:
            figure = Figure(figsize=(look.width, look.height))
            figure.text(0.5, 0.5, "no margins", ha="center", color=look.colour(_INK))
        else:
            figure = _histogram(histogram, look)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=96, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def agreement_svg(rows: list[dict[str, Any]], *, narrow: bool) -> str:
    """Accuracies with their intervals, one under the other, as an `<svg>` element.

    Args:
        rows: `name`, `accuracy`, `accuracy_low`, `accuracy_high` each; the policy's first.
        narrow: whether for a phone.
    """
    height = 0.6 + 0.27 * len(rows)
    look = _Look(4.0, height + 0.1, str) if narrow else _Look(7.6, height, str)
    with _defaults(f"agreement-{narrow}"):
        figure = Figure(figsize=(look.width, look.height), layout="constrained")
        axis = figure.add_subplot()
        _style(axis, look)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", color=look.colour(_FAINT), linewidth=0.6)
        axis.axvline(50, color=look.colour(_INK), linewidth=0.9, linestyle=(0, (3, 2)))
        for k, row in enumerate(rows):
            colour = look.colour(_SERIES["test"] if k == 0 else _INK)
            ends = [100 * row["accuracy_low"], 100 * row["accuracy_high"]]
            axis.plot(ends, [k, k], color=colour, linewidth=2.6 if k == 0 else 1.2)
            axis.plot([100 * row["accuracy"]], [k], "o", color=colour, markersize=8 - 2 * (k > 0))
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.set_xlabel("accuracy and 95 % interval, %")
        return _svg(figure, f"a{int(narrow)}")


def training_svg(curve: pl.DataFrame, *, narrow: bool) -> str:
    """Loss, accuracy and margin over the steps as an `<svg>` element; `curve` is of `thinned`."""
    look = _Look(4.0, 6.4, str) if narrow else _Look(7.6, 2.5, str)
    with _defaults(f"training-{narrow}"):
        figure = Figure(figsize=(look.width, look.height), layout="constrained")
        shape = (3, 1) if narrow else (1, 3)
        axes = figure.subplots(*shape, sharex=True)
        for axis, name in zip(axes.flat, CURVES, strict=True):
            _curve(axis, curve, name, look)
        for axis in axes.flat if not narrow else [axes.flat[-1]]:
            axis.set_xlabel("optimiser step")
        return _svg(figure, f"t{int(narrow)}")


def thinned(steps: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """At most 300 points of a training log sorted by step: means of k steps in a row, and k.

    A number that is not finite becomes null and leaves a gap.
    """
    every = max(1, math.ceil(steps.height / MAX_POINTS))
    curve = (
        steps.select("step", *CURVES)
        .with_columns(
            pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in CURVES
        )
        .with_columns(group=pl.int_range(pl.len()) // every)
        .group_by("group", maintain_order=True)
        .agg(pl.col("step").last(), *(pl.col(name).mean() for name in CURVES))
        .drop("group")
    )
    return curve, every


def shows_ln2(curve: pl.DataFrame) -> bool:
    """Whether the loss is on a scale where ln 2 says something (logistic losses)."""
    losses = curve["loss"].drop_nulls().to_list()
    return bool(losses) and is_logistic(min(losses))


def is_logistic(loss: float | None) -> bool:
    """Whether a loss is of the size of logistic ones."""
    return loss is not None and 0 <= loss <= 4 * LN2


def _histogram(histogram: dict[str, Any], look: _Look) -> Figure:
    figure = Figure(figsize=(look.width, look.height), layout="constrained")
    axis = figure.add_subplot()
    _style(axis, look)
    edges = histogram["edges"]
    for split in SPLIT_NAMES:
        if split not in histogram["counts"]:
            continue
        counts = histogram["counts"][split]
        colour = look.colour(_SERIES[split])
        shares = [100 * n / sum(counts) for n in counts]
        name = f"{SPLIT_NAMES[split]}, n = {sum(counts):,}"
        if split == "test":
            axis.stairs(shares, edges, fill=True, color=colour, alpha=0.22, linewidth=0)
        axis.stairs(
            shares, edges, color=colour, linewidth=1.6, linestyle=_DASHES[split], label=name
        )
    axis.axvline(0, color=look.colour(_INK), linewidth=1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("margin, β·nats")
    axis.set_ylabel("share of the split's pairs, %")
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=1 if look.width < 5 else 3,
        frameon=False,
        borderaxespad=0.2,
        borderpad=0.2,
        handlelength=2.2,
        labelcolor=look.colour(_INK),
    )
    return figure


def _curve(axis: Axes, curve: pl.DataFrame, name: str, look: _Look) -> None:
    _style(axis, look)
    values = [math.nan if value is None else value for value in curve[name]]
    axis.set_title(name, loc="left", fontsize=10, color=look.colour(_INK))
    colour = look.colour(_SERIES["test"])
    axis.plot(curve["step"].to_list(), values, color=colour, linewidth=1.5)
    if len(values) == 1:  # a line of one point is invisible
        axis.plot(curve["step"].to_list(), values, color=colour, marker="o", markersize=4)
    level = {"loss": LN2, "rewards/accuracies": 0.5, "rewards/margins": 0.0}[name]
    if name != "loss" or shows_ln2(curve):
        axis.axhline(level, color=look.colour(_INK), linewidth=0.9, linestyle=(0, (3, 2)))
        axis.annotate(
            {"loss": "ln 2"}.get(name, f"{level:g}"),
            xy=(1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=look.colour(_INK),
        )
    if name == "rewards/accuracies":
        axis.set_ylim(-0.03, 1.03)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _style(axis: Axes, look: _Look) -> None:
    axis.grid(axis="y", color=look.colour(_FAINT), linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(look.colour(_INK))
    axis.tick_params(colors=look.colour(_INK), length=3)
    axis.tick_params(axis="y", length=0)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(look.colour(_INK))


@contextmanager
def _defaults(salt: str) -> Iterator[None]:
    """Matplotlib's shipped settings for one figure; the caller's come back afterwards."""
    settings: dict[Any, Any] = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")
    }
    settings |= {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10.0,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        yield


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an element for inlining: colours by role, ids of its own, no prolog."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    # Matplotlib's own style element would apply to the whole page, and its size would be fixed.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", text, count=1)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    # Groups need no id; what is referred to keeps one, and no two figures of a page share it.
    referred = set(re.findall(r"#([A-Za-z][\w.]*)(?=[\")])", text))
    text = re.sub(
        r" id=\"([^\"]*)\"",
        lambda m: f' id="{prefix}-{m[1]}"' if m[1] in referred else "",
        text,
    )
    text = re.sub(r"xlink:href=\"#", f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    for sentinel, colour in _ON_PAGE.items():
        text = text.replace(sentinel, colour)
    return text


def bins(histogram: dict[str, Any]) -> list[dict[str, Any]]:
    """The histogram as table rows: `low`, `high`, `counts` per split."""
    return [
        {"low": low, "high": high, "counts": {s: n[k] for s, n in histogram["counts"].items()}}
        for k, (low, high) in enumerate(pairwise(histogram["edges"]))
    ]
