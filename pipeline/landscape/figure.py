"""A small picture of a landscape: how many pairs a loss still learns from, over β."""

import io

import matplotlib
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

_MOST_PANELS, _MOST_LOSSES = 4, 7
# Blue, orange, green, and so on: apart in every common colour blindness (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"


def landscape_png(table: pl.DataFrame, losses: list[str]) -> bytes:
    """Effective share of the pairs over β, a panel per policy, as a PNG.

    Args:
        table: `schemas.LossLandscape`.
        losses: which to draw, the first seven of them that have a β in the table; over settings
            other than β the mean is drawn.
    """
    drawn = table.filter(pl.col("beta").is_not_null() & pl.col("loss").is_in(losses))
    names = [name for name in dict.fromkeys(losses) if name in set(drawn["loss"])][:_MOST_LOSSES]
    policies = table["policy"].unique(maintain_order=True).to_list()[:_MOST_PANELS]
    with matplotlib.rc_context({"font.size": 9.0, "svg.hashsalt": "landscape"}):
        width = max(4.5, 2.6 * len(policies))
        figure = Figure(figsize=(width, 3.2), layout="constrained")
        axes = figure.subplots(1, max(1, len(policies)), sharey=True, squeeze=False)[0]
        for axis, policy in zip(axes, policies, strict=False):
            for name, colour, marker in zip(names, _COLOURS, _MARKERS, strict=False):
                line = (
                    drawn.filter((pl.col("policy") == policy) & (pl.col("loss") == name))
                    .group_by("beta")
                    .agg(pl.mean("effective_share"))
                    .sort("beta")
                )
                shares = (100 * line["effective_share"]).to_list()
                axis.plot(
                    line["beta"].to_list(), shares, marker=marker, color=colour, label=name, ms=4
                )
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_ylim(0, 105)
            axis.set_title(policy, loc="left", fontsize=9)
            axis.set_xlabel("β")
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("effective share of the pairs, %")
        figure.suptitle("A fixed policy as each loss sees it; nothing is retrained", fontsize=10)
        if names and policies:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=96, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
