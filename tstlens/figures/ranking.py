"""The strongest sites of a sweep, with how sure one can be of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.intervals import ends_of_axis, over_pairs
from tstlens.figures.sweeps import rounded, shown
from tstlens.figures.words import number, quantity, site_label, site_title
from tstlens.patching import SweepResult
from tstlens.stats import no_interval


@checked
def ranking(
    result: SweepResult,
    n: int = 10,
    *,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    title: str | None = "",
) -> go.Figure:
    """The n sites with the largest mean effect: dot and 95 % interval over pairs, a tick per pair.

    Blue is better by the metric's direction, red worse, grey within rounding: its place in the
    order is chance.

    What can mislead: the sites at the top were chosen because they came out large, so their means
    are a little too large; and effects of sites do not add up.

    Args:
        result: a sweep with its pair axis.
        n: how many sites, the largest in size first.
        clusters: one hashable per pair; see :func:`over_pairs`.
        seed: of the bootstrap.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: the result was averaged over pairs, or n below 1.

    Example:
        >>> import torch
        >>> result = SweepResult(torch.randn(6, 3), ("pair", "layer"), {"pair": tuple(range(6)),
        ...     "layer": (0, 1, 2)}, torch.zeros(6), torch.ones(6), "logit", "logit", "attn_out")
        >>> len(ranking(result, n=2).data[-1].x)
        2
    """
    if n < 1:
        raise ArgumentError(f"expected n of at least 1, got {n}")
    result = result.named()
    interval = over_pairs(result, clusters=clusters, seed=seed)
    axes = [axis for axis in result.axes if axis != "pair"]
    mean, low, high = (
        np.asarray(part).ravel() for part in (interval.mean, interval.low, interval.high)
    )
    each = shown(result, "effect").reshape(len(result.values), -1)
    order = np.argsort(-np.nan_to_num(np.abs(mean), nan=-1.0), kind="stable")[:n]
    grey = rounded(result).ravel()
    places = [np.unravel_index(at, interval.mean.shape) for at in order]
    labels = [
        site_label(
            {axis: result.coords[axis][index] for axis, index in zip(axes, place, strict=True)},
            result.time_cells,
        )
        for place in places
    ]
    unit = "" if result.unit in ("probability", "value") else f" {result.unit}"
    hover = []
    for label, at in zip(labels, order, strict=True):
        ends = no_interval(interval.n_clusters)
        if np.isfinite(low[at]):
            ends = (
                f"95 % CI {number(float(low[at]), True)} to {number(float(high[at]), True)}{unit}"
            )
        change = f"change: {number(float(mean[at]), True)}{unit}"
        change += "<br>within rounding" if grey[at] else ""
        hover.append(f"<b>{label}</b><br>{change}<br>{ends}<br>{interval.n_pairs} pairs")
    rows = np.arange(len(order))
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": style.FAINT, "width": 1.5})
    figure.add_scatter(
        x=each[:, order].ravel(),
        y=np.tile(rows, len(each)),
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 9, "color": style.MUTED, "opacity": 0.45},
        hoverinfo="skip",
        showlegend=False,
    )
    whiskers: dict[str, Any] = {}
    if np.isfinite(low[order]).any():
        whiskers["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": (high - mean)[order],
            "arrayminus": (mean - low)[order],
            "thickness": 2,
            "width": 0,
            "color": style.INK,
        }
    figure.add_scatter(
        x=mean[order],
        y=rows,
        mode="markers",
        marker={
            "size": 10,
            "color": [
                style.ROUNDING if grey[at] else style.side(float(mean[at]), result.better)
                for at in order
            ],
            "line": {"color": style.PAPER, "width": 1},
        },
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
        **whiskers,
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=rows,
        ticktext=labels,
        autorange="reversed",
        showgrid=False,
        zeroline=False,
        tickfont={"size": 12, "color": style.INK},
    )
    figure.update_xaxes(
        title={"text": quantity(result.metric, result.unit, "effect")},
        range=ends_of_axis(each[:, order], low[order], high[order]),
        zeroline=False,
        nticks=6,
    )
    heading = f"Strongest sites: {site_title(result.site)}" if title == "" else title
    marks = "dot and line: mean and 95 % interval"
    if not whiskers:
        marks = f"dot: mean, {no_interval(interval.n_clusters)}"
    subtitle = f"{interval.n_pairs} pairs; {marks}; ticks: pairs"
    subtitle += "; grey: within rounding" if grey[order].any() else ""
    size = {"plot_height": 26 * len(order) + 12, "below": 52, "left": style.room_for(labels) + 6}
    return style.finish(figure, heading, subtitle, **size)
