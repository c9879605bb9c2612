"""Attention: patterns by head, attention received over the series, sharpness and reach of heads."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Ticks
from tstlens.figures.words import axis_title, number, when
from tstlens.patching import AttentionResult

_PALE = [[0.0, "#ffffff"], [0.5, "#dcebf4"], [1.0, "#7fb2d8"]]
_MOST_PANELS = 96
_MOST_IN_MENU = 400


@draw.register
@checked
def draw_attention(
    result: AttentionResult,
    *,
    kind: Literal["patterns", "received", "heads"] = "patterns",
    series: int | Sequence[int] | None = None,
    layer: int | None = None,
    head: int | None = None,
    names: Sequence[str] | None = None,
    across: Count | None = None,
    menu: bool = False,
    title: str | None = "",
) -> go.Figure:
    """Patterns of every head, what each time step receives, or how sharp and far heads look.

    What can mislead: as for :func:`tstlens.patching.attention`; and colours of ``"patterns"`` are
    cut at the 99.5th percentile, so that single entries do not drown the rest.

    Args:
        kind: ``"patterns"`` (a small map per head, query down, key across), ``"received"``
            (attention that each time step gets, behind two series side by side) or ``"heads"``
            (entropy against mean distance, a dot per head).
        series: which series; two of them for ``"received"``; None for the mean over series (for
            ``"received"``, the first two).
        layer: only this layer; None for all (``"received"``: their mean).
        head: only this head.
        names: headings of the series shown by ``"received"``.
        across: maps or series beside each other.
        menu: of ``"patterns"``, one large map whose head is chosen from a dropdown.

    Raises:
        ArgumentError: a series, layer or head that does not exist.

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> looked = patching.attention(model, torch.randn(8, 3, 20))
        >>> figure = looked.figure(kind="received", series=(0, 4), layer=1)
    """
    n_layers, n_heads = result.entropy.shape[-2:]
    for name, value, size in (("layer", layer, n_layers), ("head", head, n_heads)):
        if value is not None and not 0 <= value < size:
            raise ArgumentError(f"expected {name} in 0..{size - 1}, got {value}")
    chosen = [series] if isinstance(series, int) else None if series is None else list(series)
    for one in chosen or ():
        if not 0 <= one < len(result.series):
            raise ArgumentError(f"expected series in 0..{len(result.series) - 1}, got {one}")
    if kind == "heads":
        return _heads(result, chosen, layer, head, title)
    if kind == "received":
        return _received(result, chosen, layer, head, names, across, title)
    return _patterns(result, chosen, layer, head, across, title, menu)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _patterns(
    result: AttentionResult,
    chosen: list[int] | None,
    layer: int | None,
    head: int | None,
    across: int | None,
    title: str | None,
    menu: bool,
) -> go.Figure:
    if chosen is not None and ("series" not in result.axes or len(chosen) != 1):
        raise ArgumentError(
            f"kind='patterns' shows one series or the mean, got series={chosen}"
            + ("" if "series" in result.axes else "; these patterns were averaged before")
        )
    which, pattern = f"mean over {len(result.series)} series", result.mean_pattern()
    if chosen is not None:
        which, pattern = f"series {chosen[0]}", result.pattern[chosen[0]]
        if pattern.ndim == 5:  # [channel, layer, head, query, key]
            which, pattern = f"{which}, mean over channels", pattern.nanmean(0)
    values = _numpy(pattern)  # [layer, head, query, key]
    places = [
        (at, number_)
        for at in (range(values.shape[0]) if layer is None else [layer])
        for number_ in (range(values.shape[1]) if head is None else [head])
    ]
    menu = menu and len(places) > 1
    if len(places) > (_MOST_IN_MENU if menu else _MOST_PANELS):
        raise ArgumentError(
            f"{len(places)} patterns are more than can be read; choose a layer or a head"
            + ("" if menu else ", or give menu=True")
        )
    shown = np.stack([values[at] for at in places])
    most = float(np.nanpercentile(shown, 99.5)) if np.isfinite(shown).any() else 1.0
    across = 1 if menu else min(across or 4, len(places))
    down = 1 if menu else -(-len(places) // across)
    each, gap = (120 if across > 2 else 200 if down * across > 1 else 300), 26
    height = down * each + (down - 1) * gap
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_xaxes=True,
        shared_yaxes=True,
        vertical_spacing=gap / height if down > 1 else 0,
        horizontal_spacing=0.02 if across > 1 else 0,
        subplot_titles=None if menu else [f"L{at}H{number_}" for at, number_ in places],
    )
    cells = result.time_cells
    ticks = Ticks.of("key", range(values.shape[3]), cells)
    # Lists of numbers where positions have no place in time: their own index.
    edges = ticks.edges if ticks.edges is not None else np.arange(values.shape[3] + 1) - 0.5
    for number_, (at, one) in enumerate(places):
        trace = go.Heatmap(
            z=values[at, one],
            x=edges,
            y=edges,
            coloraxis="coloraxis",
            customdata=_places(cells, values.shape[3]),
            hoverongaps=False,
            **marks.hovered(f"<b>L{at}H{one}</b><br>%{{customdata}}<br>%{{z:.3f}}"),
        )
        panel = 0 if menu else number_
        figure.add_trace(trace, row=panel // across + 1, col=panel % across + 1)
    ends = [float(edges[0]), float(edges[-1])]
    few = {"nticks": 3 if across > 2 else 6, "showgrid": False, "zeroline": False}
    figure.update_xaxes(range=ends, tickangle=0, **few)
    figure.update_yaxes(range=ends[::-1], **few)
    _colours(figure, most or 1.0, style.SEQUENTIAL, height)
    marks.headings_left(figure, 11)
    figure.add_annotation(
        text=axis_title("key", cells),
        showarrow=False,
        font={"size": 12, "color": style.MUTED},
        **{"xref": "paper", "yref": "paper", "x": 0.5, "y": 0},
        **{"xanchor": "center", "yanchor": "top", "yshift": -20},
    )
    label = f"attention; a row per {axis_title('query', cells)}"
    above = style.label_above(figure, label, 6 if menu else 22)
    if menu:
        marks.menu(figure, {f"L{at}H{one}": [index] for index, (at, one) in enumerate(places)})
        above = 40
    heading = "Where heads look" if title == "" else title
    mask = ", only keys before the query" if result.causal else ""
    return style.finish(figure, heading, which + mask, plot_height=height, above=above, left=34)


def _places(cells: Any, n_pos: int) -> np.ndarray:
    names = [when(cell) for cell in cells] if cells else [f"position {p}" for p in range(n_pos)]
    return np.array([[f"query {q}<br>key {k}" for k in names] for q in names], dtype=object)


def _received(
    result: AttentionResult,
    chosen: list[int] | None,
    layer: int | None,
    head: int | None,
    names: Sequence[str] | None,
    across: int | None,
    title: str | None,
) -> go.Figure:
    chosen = list(range(min(2, len(result.series)))) if chosen is None else chosen
    if names is not None and len(names) != len(chosen):
        raise ArgumentError(f"expected {len(chosen)} names, one per series, got {len(names)}")
    if result.time_cells is None:
        raise ArgumentError(
            "the place of this model's positions in time is not known (its front end is a module "
            "of your own), so they cannot be laid over the series"
        )
    received = _numpy(result.received)
    if received.ndim == 5:
        received = received.mean(1)  # channels
    received = received[:, slice(None) if layer is None else slice(layer, layer + 1)]
    received = received[:, :, slice(None) if head is None else slice(head, head + 1)]
    ratio = received.mean((1, 2)) / np.maximum(_numpy(result.uniform_received), 1e-12)
    ratio = np.where(result.observed.cpu().numpy(), ratio, np.nan)
    across = min(across or 2, len(chosen))
    down = -(-len(chosen) // across)
    each, gap = 210, 50
    height = down * each + (down - 1) * gap
    headings = [
        "<br>".join(textwrap.wrap(style.shortened(name, 42), 21))  # two lines of half a phone
        for name in names or [f"series {at}" for at in chosen]
    ]
    lines = max(heading.count("<br>") + 1 for heading in headings)
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03 if across > 1 else 0,
        vertical_spacing=gap / height if down > 1 else 0,
        subplot_titles=headings,
    )
    every = _numpy(result.series)
    if result.mask is not None:
        every = np.where(result.mask.cpu().numpy()[:, None], every, np.nan)
    some = every[chosen]
    low, high = float(np.nanmin(some)), float(np.nanmax(some))
    ends = marks.padded(low, high, 0.06)
    n_channels, n_time = every.shape[1:]
    for panel, at in enumerate(chosen):
        row, column = panel // across + 1, panel % across + 1
        place: dict[str, Any] = {"row": row, "col": column}
        said = lambda value: f"{number(value)} times uniform"  # noqa: E731
        shading = marks.shaded(ratio[at], result.time_cells, n_time, ends, said, signed=False)
        figure.add_trace(shading, **place)
        few = n_channels <= 3
        for channel in range(n_channels):
            color = style.LINES[channel % len(style.LINES)]
            said_here = f"channel {channel}, sample %{{x}}: %{{y:.4g}}"
            look = {"said": said_here, "opacity": 0.9 if few else 0.7, **place}
            values = every[at, channel]
            marks.curve(figure, np.arange(n_time), values, color, 1.6 if few else 1.0, **look)
    figure.update_xaxes(
        range=[-0.5, n_time - 0.5], showgrid=False, zeroline=False, nticks=6, tickangle=0
    )
    figure.update_xaxes(title={"text": "time (sample)"}, row=down)
    figure.update_yaxes(range=ends, zeroline=False, showgrid=False, nticks=6)
    most = float(np.nanmax(ratio[chosen]))
    _colours(figure, max(most, 1.0), _PALE, height)
    marks.headings_left(figure, 11, align="left")
    above = style.label_above(figure, "shading: attention received (1 is uniform)", 8 + 15 * lines)
    heads = "all heads" if head is None else f"head {head}"
    where = "all layers" if layer is None else f"layer {layer}"
    if layer is not None and head is not None:
        heads, where = f"L{layer}H{head}", ""
    heading = f"What {heads} look{'' if head is None else 's'} at" if title == "" else title
    subtitle = ", ".join(part for part in (where, "mean over queries") if part)
    return style.finish(figure, heading, subtitle, plot_height=height, above=above)


def _colours(figure: go.Figure, most: float, scale: list[list[Any]], height: int) -> None:
    bar = {"len": min(height, 240)}
    figure.update_layout(coloraxis={"cmin": 0, "cmax": most, "colorscale": scale, "colorbar": bar})


def _heads(
    result: AttentionResult,
    chosen: list[int] | None,
    layer: int | None,
    head: int | None,
    title: str | None,
) -> go.Figure:
    rows = slice(None) if chosen is None else chosen
    distance, unit, uniform = result.distance, "positions", result.uniform_distance
    if result.distance_samples is not None and result.uniform_distance_samples is not None:
        distance, unit = result.distance_samples, "samples"
        uniform = result.uniform_distance_samples
    entropy = _over_series(result.relative_entropy[rows])
    nats = _over_series(result.entropy[rows])
    far = _over_series(distance[rows])
    n_layers, n_heads = entropy.shape
    places = [
        (at, one)
        for at in (range(n_layers) if layer is None else [layer])
        for one in (range(n_heads) if head is None else [head])
    ]
    figure = go.Figure()
    level = float(_numpy(uniform)[rows].mean())
    figure.add_hline(y=level, line={"color": style.FAINT, "width": 1.5, "dash": "dot"})
    figure.add_annotation(
        text="as far as uniform attention",
        showarrow=False,
        font={"size": 10, "color": style.MUTED},
        **{"x": 1.05, "xref": "x", "y": level, "xanchor": "right", "yanchor": "bottom"},
    )
    labelled = len(places) <= 40
    for at in sorted({at for at, _ in places}):
        here = [place for place in places if place[0] == at]
        said = [
            f"<b>L{place[0]}H{place[1]}</b><br>entropy {number(nats[place])} nats, "
            f"{100 * entropy[place]:.0f} % of uniform<br>"
            f"mean distance {number(far[place])} {unit}"
            for place in here
        ]
        marks.dots(
            figure,
            [entropy[place] for place in here],
            [far[place] for place in here],
            style.LINES[at % len(style.LINES)],
            17 if labelled else 9,
            look={"opacity": 0.85, "line": {"color": style.PAPER, "width": 1}},
            name=f"layer {at}",
            said=said,
            mode="markers+text" if labelled else "markers",
            text=[str(one) for _, one in here],
            textfont={"size": 10, "color": style.PAPER},
        )
    figure.update_xaxes(
        title={"text": "entropy, share of uniform attention's"},
        range=[-0.04, 1.06],
        tickformat=".0%",
        zeroline=False,
    )
    drawn = [level, *(far[place] for place in places)]
    low, high = float(np.nanmin(drawn)), float(np.nanmax(drawn))
    room = 0.12 * ((high - low) or 1.0)
    figure.update_yaxes(range=[max(0.0, low - room), high + room], zeroline=False, nticks=6)
    above = style.label_above(figure, f"mean distance between query and key ({unit})", 6)
    n = len(result.entropy) if chosen is None else len(chosen)
    heading = "How sharply and how far heads look" if title == "" else title
    below = 78 + 20 * -(-len({at for at, _ in places}) // 4)
    numbers = "; the number is the head" if labelled else ""
    subtitle = f"mean over {n} series{numbers}"
    style.finish(figure, heading, subtitle, plot_height=330, above=above, below=below)
    return marks.legend_below(figure, 58, 330)


def _over_series(values: Tensor) -> np.ndarray:
    """The mean over series (and channels), [layer, head]."""
    return _numpy(values.flatten(0, -3).nanmean(0))
