"""Effects with their intervals: the strongest sites of a summary, and split-half stability.

Exact effects against estimated ones.

The strongest sites of a sweep, with how sure one can be of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Count, Seed, Share, checked
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.intervals import ends_of_axis, over_pairs
from tstlens.figures.sweeps import draw_sweep, rounded, shown
from tstlens.figures.words import number, quantity, site_label, site_title
from tstlens.patching import AblationResult, Agreement, Campaign, SplitHalf, Summary, SweepResult
from tstlens.stats import mean_known, no_interval


@draw.register
@checked
def draw_summary(
    result: Summary,
    *,
    n: Count = 12,
    of: Any = None,
    q: Share = 0.05,
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


MOST_HOVERED = 4000  # dots that carry their site's name


@draw.register
@checked
def draw_agreement(
    result: Agreement, *, pair: int | None = None, title: str | None = ""
) -> go.Figure:
    """A dot for every pair and site, exact effect across and estimate upward; the line is y = x.

    What can mislead: dots lie over each other near zero, where most sites are; the correlations
    under the title are means over pairs, not of this cloud.

    Args:
        result: of :func:`tstlens.patching.statistics`.
        pair: show this pair only; None for all.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: no such pair.
    """
    n_pairs = len(result.exact)
    if pair is not None and not -n_pairs <= pair < n_pairs:
        raise ArgumentError(f"expected pair in 0..{n_pairs - 1}, got {pair}")
    rows = range(n_pairs) if pair is None else [pair % n_pairs]
    exact, guess = (part[list(rows)].numpy() for part in (result.exact, result.approximate))
    ends = np.array([min(exact.min(), guess.min(), 0.0), max(exact.max(), guess.max(), 0.0)])
    ends += np.array([-0.04, 0.04]) * max(float(np.ptp(ends)), 1e-12)
    figure = go.Figure()
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": style.FAINT, "width": 1.5},
        hoverinfo="skip",
        showlegend=False,
    )
    labels = [site_label(site) for site in result.sites]
    hover = [
        f"<b>{label}</b>, pair {row}<br>exact {number(float(x), signed=True)}<br>"
        f"estimate {number(float(y), signed=True)}"
        for row, xs, ys in zip(rows, exact, guess, strict=True)
        for label, x, y in zip(labels, xs, ys, strict=True)
    ]
    many = exact.size > MOST_HOVERED
    # WebGL only where there are many: not every browser has it.
    draw_dots = figure.add_scattergl if many else figure.add_scatter
    draw_dots(
        x=exact.ravel(),
        y=guess.ravel(),
        mode="markers",
        marker={
            "size": 5 if exact.size > 500 else 7,
            "color": style.BLUE,
            "opacity": 0.35 if exact.size > 500 else 0.6,
        },
        hovertext=None if many else hover,
        hovertemplate=None if many else "%{hovertext}<extra></extra>",
        showlegend=False,
    )
    unit = quantity(result.metric, result.unit, "effect")
    figure.update_xaxes(title={"text": f"exact {unit}"}, range=ends, nticks=6)
    figure.update_yaxes(range=ends, nticks=6)
    above = style.label_above(figure, f"estimated {unit}")
    heading = f"Estimated against exact: {site_title(result.site)}" if title == "" else title
    which = f"pair {pair}" if pair is not None else f"{n_pairs} pairs" if n_pairs > 1 else "1 pair"
    means = [
        number(mean_known(part[list(rows)]))
        for part in (result.pearson, result.spearman, result.sign_agreement)
    ]
    subtitle = (
        f"{which} × {len(labels)} sites; mean Pearson {means[0]}, Spearman {means[1]}, same sign "
        f"{means[2]}"
    )
    return style.finish(figure, heading, subtitle, plot_height=340, above=above, left=56)


@checked
def ranking(
    result: SweepResult,
    n: Count = 10,
    *,
    clusters: Sequence[Any] | None = None,
    seed: Seed = 0,
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
