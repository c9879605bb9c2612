"""The figures of patching sweeps.

What can mislead here: probabilities saturate (a large change of the logits hardly moves a
probability near 0 or 1), so look at the log-probability beside them; the mean over pairs hides
pairs that move in opposite ways, so look at single pairs (``pair=``) or ``figures.ranking``; and
a map's colours are scaled to its own largest entry, so two maps compare only with the same
``limits``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Count, Positive, checked
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw, joined_later
from tstlens.figures.maps import Cells, Panel, Scale, Ticks, bars, heat_maps
from tstlens.figures.words import number, quantity, site_label, site_title, suffix
from tstlens.patching import SweepResult, TogetherResult
from tstlens.patching.intervals import Interval, Kind, over_pairs
from tstlens.stats import no_interval

# Axes from the one that makes panels and rows to the one that runs along the figure.
_GROUP = "pairs"  # an axis of groups of pairs
_ORDER = (
    _GROUP,
    "layer",
    "channel",
    "head",
    "slice",
    "class",
    "feature",
    "query",
    "key",
    "pos",
    "time",
)
_MOST_PANELS = 48
_MOST_IN_MENU = 400


@draw.register
@checked
def draw_sweep(
    result: SweepResult,
    *,
    kind: Kind = "effect",
    pair: int | None = None,
    title: str | None = "",
    limits: Positive | tuple[float, float] | None = None,
    clusters: Sequence[Any] | None = None,
    across: Count | None = None,
    menu: bool = False,
    per: Sequence[Any] | None = None,
) -> go.Figure:
    """The map of a sweep: bars for one axis, a heat map for two, small multiples for three.

    Several pairs are averaged; hover gives the mean with its 95 % bootstrap interval over pairs.
    Blue is better, by the metric's own direction, and red is worse (blue is more where the metric
    has none); for shares of the gap blue is towards the clean run. White is no change, grey a
    change within rounding. Positions are labelled by the samples that they stand for, where these
    are known.

    What can mislead: probabilities saturate, so look at log-probabilities beside them; and colours
    are scaled to this map's largest entry unless ``limits`` are given.

    Args:
        kind: "effect" (change against the corrupted run, in the metric's unit), "normalized"
            (share of the clean-corrupted gap closed) or "value" (the metric itself).
        pair: show this pair only; None for the mean over pairs.
        limits: the end of the zero-centred scale; for "value" its two ends.
        clusters: one hashable per pair, for the interval; see :func:`over_pairs`.
        across: small multiples beside each other.
        menu: of several maps (a layer each, say) show one at a time, chosen from a dropdown.
        per: one hashable per pair, such as its class: a map for every group of pairs, on one
            scale of colours.

    Raises:
        ArgumentError: a pair or limits that are not possible, or too many axes.

    Example:
        >>> import torch
        >>> result = SweepResult(torch.randn(6, 3, 8), ("pair", "layer", "head"),
        ...     {"pair": tuple(range(6)), "layer": (0, 1, 2), "head": tuple(range(8))},
        ...     torch.zeros(6), torch.ones(6), "log-probability of the target class", "nats", "z")
        >>> draw_sweep(result).data[0].z.shape
        (3, 8)
    """
    result = result.named()
    if per is not None:
        if pair is not None:
            raise ArgumentError("expected pair= or per=, got both")
        return _per_group(result, kind, per, clusters, limits, title, across, menu)
    if pair is not None:
        result = _one_pair(result, pair)
    interval = None
    if "pair" in result.axes and len(result.values) > 1:
        interval = over_pairs(result, kind, clusters=clusters)
        values = interval.mean
    else:
        if "pair" in result.axes:
            result = result.mean("pair")
        values = shown(result, kind)
    axes = tuple(axis for axis in result.axes if axis != "pair")
    grey = rounded(result, kind)
    scale = scale_of(result, values, kind, limits, grey)
    words: dict[str, Any] = {"title": _title(result, axes) if title == "" else title}
    if words["title"]:
        words["subtitle"] = _subtitle(result, pair)
        if grey.any():
            words["subtitle"] += "; grey: within rounding"
    if not axes:
        return _per_pair(result, kind, scale, words)
    ends: dict[str, Any] = {}
    if interval is not None:
        ends = {"low": interval.low, "high": interval.high, "each": shown(result, kind)}
    entries = {axis: result.coords[axis] for axis in axes}
    hover = _hover(result, axes, interval, kind)
    layout: dict[str, Any] = {"across": across, "menu": menu, **words}
    return by_shape(entries, values, hover, scale, grey, result.time_cells, ends, **layout)


def _per_group(
    result: SweepResult,
    kind: Kind,
    per: Sequence[Any],
    clusters: Sequence[Any] | None,
    limits: float | tuple[float, float] | None,
    title: str | None,
    across: int | None,
    menu: bool,
) -> go.Figure:
    """A map for every group of pairs, in the order in which the groups first appear."""
    n_pairs = len(result.values)
    if "pair" not in result.axes or len(per) != n_pairs:
        raise ArgumentError(
            f"per: expected one group per pair of a sweep with its pair axis [{n_pairs}], got "
            f"{len(per)}"
        )
    axes = tuple(axis for axis in result.axes if axis != "pair")
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(per):
        members.setdefault(group, []).append(index)
    values, hover, grey = [], [], []
    for index in members.values():
        part = result.at(pair=[result.coords["pair"][at] for at in index])
        own = None if clusters is None else [clusters[at] for at in index]
        interval = over_pairs(part, kind, clusters=own) if len(index) > 1 else None
        # For shares the mean effect over the mean gap, as everywhere.
        values.append(shown(part.mean("pair"), kind))
        hover.append(_hover(part, axes, interval, kind))
        grey.append(rounded(part, kind))
    several = len(members) < n_pairs
    names = [
        f"{group} ({len(index)} pair{'s' if len(index) > 1 else ''})" if several else str(group)
        for group, index in members.items()
    ]
    found, faint = np.stack(values), np.stack(grey)
    scale = scale_of(result, found, kind, limits, faint)
    words: dict[str, Any] = {"title": _title(result, axes) if title == "" else title}
    if words["title"]:
        groups = f"{n_pairs} pairs in {len(members)} groups" if several else "each pair by itself"
        words["subtitle"] = "; ".join([groups, *_subtitle(result, None).split("; ")[1:]])
        words["subtitle"] += "; grey: within rounding" if faint.any() else ""
    entries = {_GROUP: names, **{axis: result.coords[axis] for axis in axes}}
    layout: dict[str, Any] = {"across": across, "menu": menu, **words}
    texts = np.stack(hover)
    return by_shape(entries, found, texts, scale, faint, result.time_cells, **layout)


@draw.register
@checked
def draw_together(
    result: TogetherResult,
    *,
    kind: Kind = "value",
    clusters: Sequence[Any] | None = None,
    title: str | None = "",
) -> go.Figure:
    """The strongest sites patched together against how many, beside random sites as many.

    The band is the 95 % interval over pairs; the grey area holds all random sets, the grey line is
    their mean, and the dotted line what the sum of the single effects promised.

    What can mislead: sites chosen on the same pairs look better than they are.

    Args:
        kind: as for a sweep.
        clusters: one hashable per pair, for the interval; see :func:`over_pairs`.
    """
    ks, pairs = result.coords["k"], "pair" in result.axes
    mean = result.mean("pair") if pairs else result
    start, gap = float(mean.baseline), float(mean.clean - mean.baseline)

    def scaled(values: Any) -> Any:
        """Values of the metric as this kind shows them."""
        values = np.asarray(values, dtype=float) - (0.0 if kind == "value" else start)
        return values / (gap or np.nan) if kind == "normalized" else values

    figure, unit = go.Figure(), "" if kind == "normalized" else suffix(result.unit)
    wide = [ks[0] - 0.4, ks[-1] + 0.4]
    for name, run in (("corrupted run", start), ("clean run", start + gap)):
        level = float(scaled(run))
        marks.curve(figure, wide, [level] * 2, style.FAINT, 1.5)
        note = {"x": wide[1], "y": level, "xanchor": "right", "yanchor": "bottom"}
        font = {"size": 10, "color": style.MUTED}
        figure.add_annotation(text=name, showarrow=False, font=font, **note)
    if mean.random is not None and len(mean.random):
        random = scaled(mean.random.double().cpu())
        name = f"random sites ({len(random)} orders)"
        marks.band(figure, ks, random.min(0), random.max(0), style.GRID)
        said = f"%{{x}} at random: %{{y:.3g}}{unit}"
        marks.curve(figure, ks, random.mean(0), style.MUTED, name=name, said=said)
    if mean.one_by_one is not None:
        sums = scaled(start + mean.one_by_one.double().cpu())
        said = f"%{{x}} one by one, added up: %{{y:.3g}}{unit}"
        marks.curve(figure, ks, sums, style.ORANGE, 1.5, dash="dot", name="sum of each", said=said)
    values = scaled(mean.values.double().cpu())
    interval = over_pairs(result, kind, clusters=clusters) if pairs else None
    if interval is not None:
        marks.band(figure, ks, interval.low, interval.high, style.BLUE_BAND)

    def says(at: int) -> str:
        place = site_label(mean.order[ks[at] - 1], mean.time_cells)
        lines = [f"<b>{ks[at]} strongest</b>, the last: {place}"]
        lines.append(f"{quantity(result.metric, result.unit, kind)}: {number(values[at])}{unit}")
        if interval is not None:
            lines.append(_interval_text(interval, (at,), kind, suffix(result.unit)))
        return "<br>".join(lines)

    said = [says(at) for at in range(len(ks))]
    marks.curve(figure, ks, values, style.BLUE, 2.5, name="strongest sites", said=said, dots=7)
    ticks = {"tickmode": "array", "tickvals": ks} if len(ks) <= 12 else {}
    figure.update_xaxes(
        title={"text": "sites patched at once"}, range=wide, zeroline=False, **ticks
    )
    figure.update_yaxes(zeroline=False, nticks=6)
    above = style.label_above(figure, quantity(result.metric, result.unit, kind), 26)
    heading = f"Strongest sites together: {site_title(result.site)}" if title == "" else title
    subtitle = _subtitle(result, None) + f"; sites chosen on {result.made['chosen_on']} pairs"
    return style.finish(figure, heading, subtitle, plot_height=270, above=above, left=52)


@draw.register
@checked
def draw_labelled(
    result: Labelled,
    *,
    column: str | None = None,
    title: str | None = None,
    across: Count | None = None,
    **more: Any,
) -> go.Figure:
    """Any result on named axes: bars for one axis, a heat map for two, small multiples for more.

    Args:
        result: whose kind has no drawing of its own.
        column: which of its numbers; None for the first.
        title: of the figure.
        across: small multiples beside each other.
        **more: of the drawing of this kind of result, where that comes with a room that nothing
            has imported yet.

    Raises:
        UnknownNameError: no such column.
        ArgumentError: no axes, too many, or another option.
    """
    if joined_later(result):
        given = {"column": column, "title": title, "across": across}
        given = {name: value for name, value in given.items() if value is not None}
        return draw(result, **given, **more)
    if more:
        raise ArgumentError(f"expected column, title or across, got {', '.join(more)}")
    entries = result.entries()
    tables = {name: part for name, part in result.tables().items() if part.dtype.kind in "fiu"}
    name = next(iter(tables)) if column is None else column
    if name not in tables:
        raise UnknownNameError(name, tables, "This result has these columns")
    if not entries:
        raise ArgumentError("expected a result with an axis to draw along, got one number")
    values, unit = tables[name].astype(float), getattr(result, "unit", "")

    def said(*at: int) -> str:
        place = {axis: some[index] for (axis, some), index in zip(entries.items(), at, strict=True)}
        lines = [f"{other}: {number(float(part[at]))}" for other, part in tables.items()]
        return "<br>".join([f"<b>{site_label(place)}</b>", *lines])

    hover = marks.each_cell(values.shape, said)
    ends = {end: tables[end] for end in ("low", "high") if end in tables and column is None}
    scale = _scale(values, f"{name} ({unit})" if unit else name)
    cells = getattr(result, "time_cells", None)
    return by_shape(entries, values, hover, scale, None, cells, ends, across=across, title=title)


def _scale(values: np.ndarray, label: str) -> Scale:
    """Symmetric about zero where there is anything below it, else from 0."""
    finite = values[np.isfinite(values)]
    largest = style.symmetric_limit(float(np.abs(finite).max(initial=0.0)))
    below = bool((finite < 0).any())
    return Scale(label, -largest if below else 0.0, largest, diverging=below)


def by_shape(
    entries: Mapping[str, Sequence[Any]],
    values: np.ndarray,
    hover: np.ndarray,
    scale: Scale,
    grey: np.ndarray | None = None,
    cells: Cells = None,
    ends: Mapping[str, Any] | None = None,
    *,
    across: int | None = None,
    menu: bool = False,
    **words: Any,
) -> go.Figure:
    """Bars for one axis, a heat map for two, small multiples for three or four.

    Args:
        entries: the axes, in the order of ``values``, and what is along each.
        values: [*axes].
        hover: one text per value.
        scale: colours, or the vertical axis of bars.
        grey: bool like ``values``, what is no more than rounding.
        cells: samples that each position stands for.
        ends: of bars: ``low``, ``high`` and ``each``.
        across: small multiples beside each other.
        menu: one of them at a time, chosen from a dropdown.
        **words: title and subtitle.
    """
    axes = list(entries)
    order = sorted(range(len(axes)), key=lambda at: (_rank(axes[at]), at))
    faint = np.zeros(values.shape, dtype=bool) if grey is None else grey
    values, hover, faint = (part.transpose(order) for part in (values, hover, faint))
    names = [axes[at] for at in order]
    ticks = [Ticks.of(axis, entries[axis], cells) for axis in names]
    if len(names) == 1:
        return bars(ticks[0], values, hover.tolist(), scale, grey=faint, **(ends or {}), **words)
    some = {name: entries[name] for name in names[:-2]}
    panels = _panels(some, values, hover, faint, _MOST_IN_MENU if menu else _MOST_PANELS)
    return heat_maps(panels, ticks[-2], ticks[-1], scale, across=across, menu=menu, **words)


def shown(result: SweepResult, kind: str) -> np.ndarray:
    """The numbers of a result: effect, normalized effect or value, [*axes]."""
    chosen = {"effect": result.effect, "normalized": result.normalized}
    values = chosen[kind]() if kind in chosen else result.values
    return values.double().cpu().numpy()


def rounded(result: SweepResult, kind: str = "effect") -> np.ndarray:
    """Where the mean change is no more than rounding, bool [*axes without pair]."""
    mean = result.mean("pair") if "pair" in result.axes else result
    return np.asarray(mean.at_rounding().cpu().numpy() & (kind != "value"))


def scale_of(
    result: SweepResult,
    values: np.ndarray,
    kind: str,
    limits: float | tuple[float, float] | None = None,
    grey: np.ndarray | None = None,
) -> Scale:
    """The colour scale: symmetric about zero, except for values; made for what is not grey."""
    label = quantity(result.metric, result.unit, kind)
    finite = values[np.isfinite(values)]
    if kind == "value":
        if limits is not None and not isinstance(limits, tuple):
            raise ArgumentError(f"limits of values are (low, high), got {limits!r}")
        low, high = limits or (
            (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        )
        return Scale(label, low, high if high > low else low + 1.0, diverging=False)
    if isinstance(limits, tuple):
        if len(limits) != 2 or not all(isinstance(end, int | float) for end in limits):
            raise ArgumentError(f"expected limits as one number or (low, high), got {limits!r}")
        if limits[0] != -limits[1] or limits[1] <= 0:
            raise ArgumentError(f"limits of a change are one number or (-x, x), got {limits!r}")
        limits = limits[1]
    if grey is not None and not grey.all():
        finite = values[np.isfinite(values) & ~grey]
    largest = limits or style.symmetric_limit(float(np.abs(finite).max(initial=0.0)))
    better = result.better if kind == "effect" else None  # a share is of the way to the clean run
    return Scale(label, -largest, largest, better=better)


def _rank(axis: str) -> int:
    return _ORDER.index(axis) if axis in _ORDER else _ORDER.index("slice")


def _one_pair(result: SweepResult, pair: int) -> SweepResult:
    if "pair" not in result.axes:
        raise ArgumentError(f"pair={pair}: the result was averaged over pairs before")
    at = marks.row_of(pair, len(result.values), "pair")
    return replace(result.at(pair=result.coords["pair"][at]), n_pairs=1)


def _panels(
    along: Mapping[str, Sequence[Any]],
    values: np.ndarray,
    hover: np.ndarray,
    grey: np.ndarray,
    most: int,
) -> list[Panel]:
    names, entries = list(along), list(along.values())
    if len(names) > 2:
        raise ArgumentError(
            f"expected at most 4 axes beside the pairs, got {len(names) + 2}; average over some "
            "with result.mean(axis)"
        )
    n_panels = math.prod(len(some) for some in entries)
    if n_panels > most:
        raise ArgumentError(
            f"{n_panels} maps ({' x '.join(names)}) are more than can be read; average over an "
            "axis with result.mean(axis), choose entries with result.at(...), or give menu=True"
        )
    panels = []
    for at in product(*(range(len(some)) for some in entries)):
        place = {name: some[index] for name, some, index in zip(names, entries, at, strict=True)}
        group = place.pop(_GROUP, None)
        name = f"layer {place['layer']}" if list(place) == ["layer"] else site_label(place)
        if group is not None:
            name = f"{group}, {name}" if place else str(group)
        panels.append(Panel(name if names else "", values[at], hover[at], grey[at]))
    return panels


def _hover(
    result: SweepResult, axes: tuple[str, ...], interval: Interval | None, kind: str
) -> np.ndarray:
    """What hovering over each entry says, [*axes]."""
    mean = result.mean("pair") if "pair" in result.axes else result
    values, effects, shares = mean.values, mean.effect(), mean.normalized()
    rounding, grey = mean.rounding, rounded(mean)
    unit = suffix(result.unit)

    def text(*at: int) -> str:
        place = {axis: result.coords[axis][index] for axis, index in zip(axes, at, strict=True)}
        lines = [
            f"<b>{site_label(place, result.time_cells)}</b>",
            f"{result.metric.removesuffix(' of the target class')}: "
            f"{number(float(values[at]))}{unit}",
            f"change: {number(float(effects[at]), signed=True)}{unit}, "
            f"{_percent(float(shares[at]))} of the gap",
        ]
        if grey[at] and rounding is not None:
            lines.append(f"within rounding (±{number(float(rounding))})")
        if interval is not None:
            lines.append(_interval_text(interval, at, kind, unit))
        return "<br>".join(lines)

    return marks.each_cell(values.shape, text)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == share else "no share"


def _interval_text(interval: Interval, at: tuple[int, ...], kind: str, unit: str) -> str:
    low, high = float(interval.low[at]), float(interval.high[at])
    pairs = f"mean over {interval.n_pairs} pairs"
    if low != low:
        return f"{pairs}, {no_interval(interval.n_clusters)}"
    signed = kind == "effect"
    ends = f"{number(low, signed)} to {number(high, signed)}"
    if kind == "normalized":
        ends, unit = f"{100 * low:.0f} to {100 * high:.0f}", " %"
    of = {"effect": "change", "normalized": "share", "value": "value"}[kind]
    return f"{pairs}; 95 % CI of the {of} {ends}{unit}"


def _title(result: SweepResult, axes: tuple[str, ...]) -> str:
    by = {"pos": "position", "time": "sample"}
    words = [by.get(axis, axis) for axis in axes]
    how = "Restoring" if result.source == "clean" else "Patching"
    return f"{how} {site_title(result.site)}" + (f" by {' × '.join(words)}" if words else "")


def _subtitle(result: SweepResult, pair: int | None) -> str:
    unit = suffix(result.unit)
    which = f"pair {pair}" if pair is not None else f"mean over {result.n_pairs} pairs"
    if result.n_pairs == 1 and pair is None:
        which = "one pair"
    source = "" if result.source == "clean" else f"; patched with {result.source}"
    baseline, clean = float(result.baseline.mean()), float(result.clean.mean())
    return (
        f"{which}; {result.metric}: corrupted {number(baseline)}, clean {number(clean)}{unit}"
        f"{source}"
    )


def _per_pair(result: SweepResult, kind: str, scale: Scale, words: dict[str, Any]) -> go.Figure:
    """A sweep of a single site: one bar for every pair."""
    if "pair" not in result.axes:
        names, each = ("all pairs",), shown(result, kind)[None]
    else:
        names = tuple(str(entry) for entry in result.coords["pair"])
        each = shown(result, kind)
    grey = result.at_rounding().reshape(-1).cpu().numpy() & (kind != "value")
    scale = scale_of(result, each, kind, grey=grey)
    unit = suffix(result.unit)
    hover = [
        f"<b>pair {name}</b><br>{scale.label}: {number(float(value), kind == 'effect')}{unit}"
        for name, value in zip(names, each, strict=True)
    ]
    return bars(Ticks("pair", names), each, hover, scale, grey=grey, **words)
