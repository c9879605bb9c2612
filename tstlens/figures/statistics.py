"""Effects with their intervals: the strongest sites of a summary, and split-half stability."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.intervals import ends_of_axis
from tstlens.figures.sweeps import draw_sweep
from tstlens.figures.words import number, quantity, site_label, site_title
from tstlens.patching import AblationResult, Campaign, SplitHalf, Summary
from tstlens.stats import mean_known, no_interval


@draw.register
@checked
def draw_summary(
    result: Summary,
    *,
    n: int = 12,
    of: Any = None,
    q: float = 0.05,
    title: str | None = "",
) -> go.Figure:
    """The n strongest sites: dot and interval, filled where the q-value is at most ``q``.

    What can mislead: the sites at the top were chosen because they came out large, so their means
    are a little too large; a hollow dot is "not shown", not "no effect". The interval of a filled
    dot can cross 0, as q tests another thing in another way: whether signs could have fallen like
    this by chance (sign flips), while the ends of the interval (bootstrap-t) are pushed out by a
    few unusually large or skewed effects.

    Args:
        result: of :func:`tstlens.patching.summary`.
        n: how many sites, the largest in size first.
        of: the class to show; None for the first (there is one without ``by``).
        q: the false discovery rate at which dots are filled.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: no such class, or n below 1.
    """
    if n < 1:
        raise ArgumentError(f"expected n of at least 1, got {n}")
    classes = result.coords["class"]
    if of is not None and of not in classes:
        raise ArgumentError(f"expected of= one of {classes}, got {of!r}")
    at_class = 0 if of is None else classes.index(of)
    parts = (result.effect, result.low, result.high, result.q)
    effect, low, high, chance = (part[at_class].ravel() for part in parts)
    order = np.argsort(-np.nan_to_num(np.abs(effect), nan=-1.0), kind="stable")[:n]
    axes = result.axes[1:]
    shape = result.effect.shape[1:]
    labels, hover = [], []
    unit = "" if result.unit in ("probability", "value") else f" {result.unit}"
    for at in order:
        place = np.unravel_index(at, shape)
        entries = {a: result.coords[a][i] for a, i in zip(axes, place, strict=True)}
        labels.append(site_label(entries, result.time_cells))
        ends = f"{number(float(low[at]), True)} to {number(float(high[at]), True)}{unit}"
        interval = f"{100 * result.level:.0f} % CI {ends}"
        if low[at] != low[at]:
            interval = no_interval(result.n_clusters[at_class])
        hover.append(
            f"<b>{labels[-1]}</b><br>{number(float(effect[at]), True)}{unit}<br>{interval}"
            f"<br>q = {number(float(chance[at]))}"
        )
    rows = np.arange(len(order))
    faintest = 0.0 if result.rounding is None else result.rounding[at_class]
    grey = (np.abs(effect) > 0) & (np.abs(effect) <= faintest)
    colors = [
        style.ROUNDING if grey[at] else style.side(float(effect[at]), result.better) for at in order
    ]
    filled = [
        color if chance[at] <= q else style.PAPER for at, color in zip(order, colors, strict=True)
    ]
    whiskers: dict[str, Any] = {}
    if np.isfinite(low[order]).any():
        whiskers["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": (high - effect)[order],
            "arrayminus": (effect - low)[order],
            "thickness": 2,
            "width": 0,
            "color": style.INK,
        }
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": style.FAINT, "width": 1.5})
    figure.add_scatter(
        x=effect[order],
        y=rows,
        mode="markers",
        marker={"size": 10, "color": filled, "line": {"color": colors, "width": 2}},
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
        range=ends_of_axis(effect[order], low[order], high[order]),
        zeroline=False,
        nticks=6,
    )
    heading = f"Strongest sites: {site_title(result.site)}" if title == "" else title
    name = "" if len(classes) == 1 and classes[0] == "all" else f"class {classes[at_class]}; "
    pairs, clusters = result.n_pairs[at_class], result.n_clusters[at_class]
    subtitle = (
        f"{name}{pairs} pairs, {clusters} independent; line: {100 * result.level:.0f} % interval; "
        f"filled: q ≤ {q:g}"
    )
    subtitle += "; grey: within rounding" if grey[order].any() else ""
    size = {"plot_height": 26 * len(order) + 12, "below": 52, "left": style.room_for(labels) + 6}
    style.finish(figure, heading, subtitle, **size)
    # Long labels push the plot to the right; on a phone the title would leave the figure with it.
    return figure.update_layout(title={"xref": "container", "x": 0.02})


@draw.register
@checked
def draw_split_half(result: SplitHalf, *, title: str | None = "") -> go.Figure:
    """How often random halves of the series agree how well: a histogram of rank correlations.

    Args:
        result: of :func:`tstlens.patching.split_half`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    known = result.spearman[np.isfinite(result.spearman)]
    low = min(0.0, float(known.min(initial=0.0)))
    figure = go.Figure()
    figure.add_histogram(
        x=known,
        xbins={"start": low - low % 0.05, "end": 1.0001, "size": 0.05},
        marker={"color": style.BLUE, "line": {"color": style.PAPER, "width": 1}},
        hovertemplate="%{x}: %{y} splits<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(
        title={"text": "rank correlation of two halves (Spearman)"}, range=[low - 0.05, 1.05]
    )
    above = style.label_above(figure, "splits")
    heading = f"Split-half stability: {site_title(result.site)}" if title == "" else title
    subtitle = (
        f"{result.n_clusters} independent series; mean {number(mean_known(known))}, all series "
        f"together {number(result.reliability)}; top-{result.k} overlap "
        f"{number(mean_known(result.top_k_overlap))}"
    )
    return style.finish(figure, heading, subtitle, plot_height=220, above=above, left=46)


@draw.register
@checked
def draw_ablation(result: AblationResult, *, title: str | None = "", **options: Any) -> go.Figure:
    """The map of an ablation: as of a sweep, with the unablated metric under the title.

    Red is where the metric falls without the component.

    Args:
        result: of :func:`tstlens.patching.ablate`.
        title: "" for one made from the result, None for none.
        **options: of :func:`tstlens.figures.draw_sweep`.

    Returns:
        A plotly figure.
    """
    figure = draw_sweep(result, title=None, **options)
    if title is None:
        return figure
    how = {"zero": "zero", "mean": "its mean", "resample": "another series'"}[result.source]
    whole_block = result.site == "block" or result.site.startswith("Site('block'")
    what = "the block's contribution" if whole_block else site_title(result.site)
    heading = f"Replacing {what} by {how}" if title == "" else title
    unit = "" if result.unit in ("probability", "value") else f" {result.unit}"
    subtitle = (
        f"mean over {result.n_pairs} series; {result.metric}: "
        f"{number(float(result.baseline.mean()))}{unit} unablated"
    )
    layout: Any = figure.layout
    margin, height = layout.margin, layout.height
    plot_height = int(height - margin.t - margin.b)
    return style.finish(
        figure,
        heading,
        subtitle,
        plot_height=plot_height,
        above=int(margin.t) - 14,
        below=int(margin.b),
        left=int(margin.l),
    )


@draw.register
@checked
def draw_campaign(
    result: Campaign, *, site: str = "z", metric: str = "log_prob", **options: Any
) -> go.Figure:
    """The strongest places of one site over a campaign's pairs, clean patched into corrupted.

    Args:
        result: of :func:`tstlens.patching.run_campaign`.
        site: which site, by head or layer.
        metric: read with which metric.
        **options: of :func:`draw_summary`.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: the campaign did not sweep this site with this metric.
    """
    keys = [key for key in result.results if key[1] == site and key[3] == metric]
    if not keys:
        raise ArgumentError(
            f"the campaign holds no sweep of site {site!r} read with {metric!r}; it holds sites "
            f"{sorted({key[1] for key in result.results})}"
        )
    direction, _, axes, _ = min(keys, key=lambda key: len(key[2]))
    return draw(result.summary(site, axes.split(" x "), metric, direction), **options)
