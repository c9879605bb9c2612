"""How sure one can be: the strongest sites with intervals, split halves, estimates against exact.

The map of an ablation stands here too: a sweep's, with other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Count, Seed, Share, checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import ends_of_axis
from tstlens.figures.sweeps import draw_sweep, rounded, shown
from tstlens.figures.words import number, quantity, site_label, site_title, suffix
from tstlens.metrics import Better
from tstlens.patching import AblationResult, Agreement, Campaign, SplitHalf, Summary, SweepResult
from tstlens.patching.intervals import over_pairs
from tstlens.stats import mean_known, no_interval

MOST_HOVERED = 4000  # dots that carry their site's name


@dataclass
class _Strongest:
    """Sites as rows, the strongest on top: a dot with its interval each."""

    n: int
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    grey: np.ndarray
    better: Better | None
    figure: go.Figure = field(default_factory=go.Figure)

    def __post_init__(self) -> None:
        size = np.nan_to_num(np.abs(self.mean), nan=-1.0)
        self.order = np.argsort(-size, kind="stable")[: self.n]
        self.figure.add_vline(x=0, line={"color": style.FAINT, "width": 1.5})

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.low[self.order]).any())

    def labels(self, result: SweepResult | Summary, axes: Sequence[str], shape: Any) -> list[str]:
        places = [np.unravel_index(at, shape) for at in self.order]
        entries = [
            {axis: result.coords[axis][index] for axis, index in zip(axes, place, strict=True)}
            for place in places
        ]
        return [site_label(one, result.time_cells) for one in entries]

    def colors(self) -> list[str]:
        return [
            style.ROUNDING if self.grey[at] else style.side(float(self.mean[at]), self.better)
            for at in self.order
        ]

    def draw(
        self,
        labels: list[str],
        said: list[str],
        colors: list[str],
        line: Any,
        label: str,
        each: Any,
    ) -> None:
        order = self.order
        mean, low, high = self.mean[order], self.low[order], self.high[order]
        error: dict[str, Any] = {"error_x": marks.whiskers(mean, low, high)} if self.known else {}
        rows = np.arange(len(order))
        marks.dots(self.figure, mean, rows, colors, 10, look={"line": line}, said=said, **error)
        font = {"size": 12, "color": style.INK}
        marks.named_rows(self.figure, labels, autorange="reversed", tickfont=font)
        reach = ends_of_axis(each, low, high)
        self.figure.update_xaxes(title={"text": label}, range=reach, zeroline=False, nticks=6)

    def finish(self, labels: list[str], heading: str | None, subtitle: str) -> go.Figure:
        subtitle += "; grey: within rounding" if self.grey[self.order].any() else ""
        left, height = style.room_for(labels) + 6, 26 * len(labels) + 12
        return style.finish(self.figure, heading, subtitle, plot_height=height, below=52, left=left)


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
        n: how many sites, the largest in size first.
        of: the class to show; None for the first (there is one without ``by``).
        q: the false discovery rate at which dots are filled.

    Raises:
        ArgumentError: no such class.
    """
    classes = result.coords["class"]
    if of is not None and of not in classes:
        raise ArgumentError(f"expected of= one of {classes}, got {of!r}")
    at_class = 0 if of is None else classes.index(of)
    parts = (result.effect, result.low, result.high, result.q)
    effect, low, high, chance = (part[at_class].ravel() for part in parts)
    faintest = 0.0 if result.rounding is None else result.rounding[at_class]
    grey = (np.abs(effect) > 0) & (np.abs(effect) <= faintest)
    rows = _Strongest(n, effect, low, high, grey, result.better)
    labels = rows.labels(result, result.axes[1:], result.effect.shape[1:])
    unit, said = suffix(result.unit), []
    for label, at in zip(labels, rows.order, strict=True):
        ends = f"{number(float(low[at]), True)} to {number(float(high[at]), True)}{unit}"
        interval = f"{100 * result.level:.0f} % CI {ends}"
        if low[at] != low[at]:
            interval = no_interval(result.n_clusters[at_class])
        said.append(
            f"<b>{label}</b><br>{number(float(effect[at]), True)}{unit}<br>{interval}"
            f"<br>q = {number(float(chance[at]))}"
        )
    colors = rows.colors()
    filled = [
        color if chance[at] <= q else style.PAPER
        for at, color in zip(rows.order, colors, strict=True)
    ]
    label = quantity(result.metric, result.unit, "effect")
    rows.draw(labels, said, filled, {"color": colors, "width": 2}, label, effect[rows.order])
    name = "" if len(classes) == 1 and classes[0] == "all" else f"class {classes[at_class]}; "
    pairs, clusters = result.n_pairs[at_class], result.n_clusters[at_class]
    subtitle = (
        f"{name}{pairs} pairs, {clusters} independent; line: {100 * result.level:.0f} % interval; "
        f"filled: q ≤ {q:g}"
    )
    heading = f"Strongest sites: {site_title(result.site)}" if title == "" else title
    figure = rows.finish(labels, heading, subtitle)
    # Long labels push the plot to the right; on a phone the title would leave the figure with it.
    return figure.update_layout(title={"xref": "container", "x": 0.02})


@draw.register
@checked
def draw_split_half(result: SplitHalf, *, title: str | None = "") -> go.Figure:
    """How often random halves of the series agree how well: a histogram of rank correlations."""
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

    Red is where the metric falls without the component. Options are those of a sweep's figure.
    """
    figure = draw_sweep(result, title=None, **options)
    if title is None:
        return figure
    how = {"zero": "zero", "mean": "its mean", "resample": "another series'"}[result.source]
    whole_block = result.site == "block" or result.site.startswith("Site('block'")
    what = "the block's contribution" if whole_block else site_title(result.site)
    heading = f"Replacing {what} by {how}" if title == "" else title
    subtitle = (
        f"mean over {result.n_pairs} series; {result.metric}: "
        f"{number(float(result.baseline.mean()))}{suffix(result.unit)} unablated"
    )
    layout: Any = figure.layout
    margin = layout.margin
    size = {"above": int(margin.t) - 14, "below": int(margin.b), "left": int(margin.l)}
    height = int(layout.height - margin.t - margin.b)
    return style.finish(figure, heading, subtitle, plot_height=height, **size)


@draw.register
@checked
def draw_campaign(
    result: Campaign,
    *,
    site: str = "z",
    axes: Sequence[str] | None = None,
    metric: str = "log_prob",
    direction: str = "denoise",
    per: Literal["class", "pair"] | None = None,
    **options: Any,
) -> go.Figure:
    """The strongest places of one site over a campaign's pairs, or its map per class or per pair.

    Args:
        site: which site.
        axes: of the sweep; the fewest that the campaign swept where None.
        metric: read with which metric.
        direction: "denoise" (clean patched into corrupted) or "noise".
        per: ``"class"`` or ``"pair"`` draws a map for each, on one scale of colours, chosen from a
            dropdown (``menu=False``: beside each other); None the strongest places over all.
        **options: of a summary's figure, or of a sweep's.

    Raises:
        ArgumentError: the campaign did not sweep this site with this metric.
    """
    keys = [
        key
        for key in result.results
        if (key[0], key[1], key[3]) == (direction, site, metric)
        and (axes is None or list(axes) == key[2].split(" x "))
    ]
    if not keys:
        held = sorted({key[1] for key in result.results if key[0] == direction})
        of = "" if axes is None else f" over {' x '.join(axes)}"
        raise ArgumentError(
            f"the campaign holds no sweep of site {site!r}{of} read with {metric!r}, direction "
            f"{direction!r}; it holds sites {held}"
        )
    _, _, swept, _ = min(keys, key=lambda key: len(key[2]))
    names = swept.split(" x ")
    if per is None:
        return draw(result.summary(site, names, metric, direction), **options)
    found = result.result(site, names, metric, direction)
    if per == "class":
        groups: list[Any] = [f"class {label}" for label in result.target.tolist()]
        return draw(found, per=groups, clusters=result.clusters, **{"menu": True, **options})
    groups = [f"pair {pair}" for pair in found.coords["pair"]]
    return draw(found, per=groups, **{"menu": True, **options})


@draw.register
@checked
def draw_agreement(
    result: Agreement, *, pair: int | None = None, title: str | None = ""
) -> go.Figure:
    """A dot for every pair and site, exact effect across and estimate upward; the line is y = x.

    What can mislead: dots lie over each other near zero, where most sites are; the correlations
    under the title are means over pairs, not of this cloud.

    Args:
        pair: show this pair only; None for all.

    Raises:
        ArgumentError: no such pair.
    """
    n_pairs = len(result.exact)
    rows = list(range(n_pairs)) if pair is None else [marks.row_of(pair, n_pairs, "pair")]
    exact, guess = (part[rows].numpy() for part in (result.exact, result.approximate))
    figure = go.Figure()
    low, high = min(exact.min(), guess.min(), 0.0), max(exact.max(), guess.max(), 0.0)
    ends = marks.diagonal(figure, low, high)
    labels = [site_label(site) for site in result.sites]
    said = [
        f"<b>{label}</b>, pair {row}<br>exact {number(float(x), signed=True)}<br>"
        f"estimate {number(float(y), signed=True)}"
        for row, xs, ys in zip(rows, exact, guess, strict=True)
        for label, x, y in zip(labels, xs, ys, strict=True)
    ]
    many, dense = exact.size > MOST_HOVERED, exact.size > 500
    # WebGL only where there are many: not every browser has it.
    draw_dots = figure.add_scattergl if many else figure.add_scatter
    draw_dots(
        x=exact.ravel(),
        y=guess.ravel(),
        mode="markers",
        marker={
            "size": 5 if dense else 7, "color": style.BLUE, "opacity": 0.35 if dense else 0.6
        },
        showlegend=False,
        **({} if many else marks.hovered(said)),
    )  # fmt: skip
    unit = quantity(result.metric, result.unit, "effect")
    figure.update_xaxes(title={"text": f"exact {unit}"}, range=ends, nticks=6)
    figure.update_yaxes(range=ends, nticks=6)
    above = style.label_above(figure, f"estimated {unit}")
    heading = f"Estimated against exact: {site_title(result.site)}" if title == "" else title
    which = f"pair {pair}" if pair is not None else f"{n_pairs} pairs" if n_pairs > 1 else "1 pair"
    parts = (result.pearson, result.spearman, result.sign_agreement)
    means = [number(mean_known(part[rows])) for part in parts]
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
        clusters: one hashable per pair; see :func:`tstlens.patching.over_pairs`.
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
    result = result.named()
    interval = over_pairs(result, clusters=clusters, seed=seed)
    parts = (interval.mean, interval.low, interval.high, rounded(result))
    mean, low, high, grey = (np.asarray(part).ravel() for part in parts)
    rows = _Strongest(n, mean, low, high, grey, result.better)
    axes = [axis for axis in result.axes if axis != "pair"]
    labels = rows.labels(result, axes, interval.mean.shape)
    unit, said = suffix(result.unit), []
    for label, at in zip(labels, rows.order, strict=True):
        ends = no_interval(interval.n_clusters)
        if np.isfinite(low[at]):
            reach = f"{number(float(low[at]), True)} to {number(float(high[at]), True)}"
            ends = f"95 % CI {reach}{unit}"
        change = f"change: {number(float(mean[at]), True)}{unit}"
        change += "<br>within rounding" if grey[at] else ""
        said.append(f"<b>{label}</b><br>{change}<br>{ends}<br>{interval.n_pairs} pairs")
    each = shown(result, "effect").reshape(len(result.values), -1)[:, rows.order]
    at_row = np.tile(np.arange(len(labels)), len(each))
    tick = {"symbol": "line-ns-open", "opacity": 0.45}
    marks.dots(rows.figure, each.ravel(), at_row, style.MUTED, 9, look=tick)
    label = quantity(result.metric, result.unit, "effect")
    rows.draw(labels, said, rows.colors(), {"color": style.PAPER, "width": 1}, label, each)
    words = "dot and line: mean and 95 % interval"
    if not rows.known:
        words = f"dot: mean, {no_interval(interval.n_clusters)}"
    heading = f"Strongest sites: {site_title(result.site)}" if title == "" else title
    return rows.finish(labels, heading, f"{interval.n_pairs} pairs; {words}; ticks: pairs")
