"""The lens: what the head reads at every depth, as curves, classes, positions or forecasts.

Similarity of layers as a map, and what skipping runs of layers costs.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.words import hook_labels, number, when
from tstlens.patching import LensResult
from tstlens.probing.layer_similarity import Similarity, SkipCost
from tstlens.probing.unit_matching import UnitMatch


@draw.register
@checked
def draw_lens(
    result: LensResult,
    *,
    kind: Literal["curves", "classes", "positions", "forecast"] | None = None,
    series: int | None = None,
    channel: int = 0,
    title: str | None = "",
) -> go.Figure:
    """What the head would say at every depth.

    The subtitle says how far the readings before the last can be trusted.

    Args:
        kind: ``"curves"`` over depth (accuracy and nats, or squared error; all series),
            ``"classes"`` (probability of every class at every point), ``"positions"`` (probability
            of one class at every point and position read by itself) or ``"forecast"`` (the series
            and its forecasts in its own units). None for curves, or with ``series`` for classes or
            the forecast.
        series: which series, for all but curves.
        channel: of the forecast.

    Raises:
        ArgumentError: a kind that this result or call has not what it takes for.

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> figure = patching.lens(model, torch.randn(8, 3, 20)).figure(series=0)
    """
    by_default = "classes" if result.kind == "classes" else "forecast"
    kind = kind or ("curves" if series is None else by_default)
    if kind == "curves":
        return _curves(result, "What the head reads at every depth" if title == "" else title)
    wanted = "forecast" if kind == "forecast" else "classes"
    if result.kind != wanted:
        raise ArgumentError(f"kind={kind!r} needs a lens of {wanted}, this is one of {result.kind}")
    n_series = result.output.shape[1]
    if series is None or not -n_series <= series < n_series:
        raise ArgumentError(f"kind={kind!r} shows one series in 0..{n_series - 1}, got {series}")
    if kind == "forecast":
        return _forecast(result, series % n_series, channel, title)
    return (_classes if kind == "classes" else _positions)(result, series % n_series, title)


def _name(result: LensResult, index: int) -> str:
    names = result.class_names
    return names[index] if names and index < len(names) else str(index)


def _curves(result: LensResult, title: str | None) -> go.Figure:
    summary = result.summary()
    lines: list[tuple[str, str, str, int]] = [  # column, name, colour, panel
        ("accuracy", "accuracy", style.BLUE, 1),
        ("agreement", "same class as the output", style.MUTED, 1),
        ("log_prob", "log p of the true class", style.BLUE, 2),
        ("kl", "KL from the output", style.ORANGE, 2),
        ("mse_target", "true values", style.BLUE, 1),
        ("mse_final", "final forecast", style.ORANGE, 1),
    ]
    lines = [line for line in lines if line[0] in summary]
    n_panels = max(line[3] for line in lines)
    headings = ["share of series", "nats"]
    if result.kind == "forecast":
        headings = ["mean squared distance from the"]
    # Named in their own colour: a legend below would not fit a phone.
    for at in range(n_panels):
        named = [f"<b style='color:{c}'>{name}</b>" for _, name, c, row in lines if row == at + 1]
        headings[at] += (": " if result.kind == "classes" else " ") + ", ".join(named)
    gap, each = 40, 150
    height = each * n_panels + gap * (n_panels - 1)
    figure = make_subplots(
        rows=n_panels,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=gap / height if n_panels > 1 else 0,
        subplot_titles=headings[:n_panels],
    )
    for column, name, color, row in lines:
        values = summary[column].to_numpy()
        said = [
            f"<b>{point}</b><br>{name}: {number(value)}"
            for point, value in zip(result.points, values, strict=True)
        ]
        dash = "dot" if column == "agreement" else None
        more: Any = {"name": name, "showlegend": False, "row": row, "col": 1}
        marks.curve(
            figure, list(result.points), values, color, said=said, dash=dash, dots=7, **more
        )
    step = -(-len(result.points) // 16)
    figure.update_xaxes(
        type="category",
        tickmode="array",
        tickvals=list(result.points[::step]),
        ticktext=[_broken(point) for point in result.points[::step]],
        tickangle=0,
        range=[-0.4, len(result.points) - 0.6],
        showgrid=False,
    )
    figure.update_yaxes(nticks=5, zeroline=False)
    if result.kind == "classes":
        shares = [summary[column].min() for column, *_, row in lines if row == 1]
        low = max(0.0, min(shares) - 0.05)
        figure.update_yaxes(range=[low, 1.02], tickformat=".0%", row=1, col=1)
    figure.update_annotations(x=0, xanchor="left", font={"size": 11, "color": style.MUTED})
    subtitle = f"{result.output.shape[1]} series; {result.heuristic}"
    return style.finish(figure, title, subtitle, plot_height=height, above=20)


def _broken(point: str) -> str:
    """A point's name on two lines, so that seven of them stand beside each other on a phone."""
    return point.replace(" ", "<br>")


def _classes(result: LensResult, at: int, title: str | None) -> go.Figure:
    values = result.probabilities()[:, at].T.double().cpu().numpy()  # [class, point]
    names = [_name(result, index) for index in range(len(values))]

    def said(row: int, column: int) -> str:
        point, value = result.points[column], number(values[row, column])
        return f"<b>{point}</b><br>{names[row]}: probability {value}"

    hover = marks.each_cell(values.shape, said)
    truth = "" if result.target is None else f", true class {_name(result, int(result.target[at]))}"
    heading = f"Series {at}{style.shortened(truth, 60)}" if title == "" else title
    short = [style.shortened(name) for name in names]
    if len(set(short)) < len(names):  # cut off, some would read the same
        short = [style.shortened(f"{index}: {name}") for index, name in enumerate(names)]
    figure = heat_maps(
        [Panel("", values, hover)],
        Ticks("", tuple(short)),
        Ticks("", tuple(_broken(point) for point in result.points)),
        Scale("probability of each class", 0.0, 1.0, diverging=False),
        title=heading,
        subtitle=result.heuristic,
    )
    return marks.title_at_edge(figure.update_xaxes(tickangle=0))


def _positions(result: LensResult, at: int, title: str | None) -> go.Figure:
    if result.by_pos is None or result.observed is None:
        raise ArgumentError("kind='positions' needs patching.lens(..., by_pos=True)")
    index = int(result.final[at].argmax()) if result.target is None else int(result.target[at])
    probability = result.by_pos[:, at].softmax(-1)[..., index].double().cpu().numpy()
    values = np.where(result.observed[at].cpu().numpy()[None], probability, np.nan)
    cells = result.time_cells
    columns = Ticks.of("pos", range(values.shape[1]), cells)

    def said(row: int, pos: int) -> str:
        where = when(cells[pos]) if cells else f"position {pos}"
        return f"<b>{result.points[row]}, {where}</b><br>probability {number(values[row, pos])}"

    hover = marks.each_cell(values.shape, said)
    which = "predicted class" if result.target is None else "true class"
    heading = f"Series {at}, every position by itself" if title == "" else title
    label = f"probability of the {which} {style.shortened(_name(result, index), 24)}"
    figure = heat_maps(
        [Panel("", values, hover)],
        Ticks("", tuple(result.points)),
        columns,
        Scale(label, 0.0, 1.0, diverging=False),
        title=heading,
        subtitle=result.heuristic,
    )
    return marks.title_at_edge(figure)


def _forecast(result: LensResult, at: int, channel: int, title: str | None) -> go.Figure:
    n_points, _, n_channels, horizon = result.output.shape
    if not 0 <= channel < n_channels:
        raise ArgumentError(f"expected channel in 0..{n_channels - 1}, got {channel}")
    figure = go.Figure()
    n_time, steps = 0, np.arange(horizon)
    if result.series is not None:
        past = result.series[at, channel].double().cpu().numpy()
        n_time = len(past)
        first = max(0, n_time - 2 * horizon)  # enough to see what the forecast goes on from
        _line(figure, np.arange(first, n_time), past[first:], "series", style.INK, 1.6)
    if result.target is not None:
        truth = result.target[at, channel].double().cpu().numpy()
        _line(figure, n_time + steps, truth, "true values", style.INK, 1.6, dash="dot")
    for number_, point in enumerate(result.points):
        last = number_ == n_points - 1
        color = style.BLUE if last else _shade(number_ / max(1, n_points - 1))
        values = result.output[number_, at, channel].double().cpu().numpy()
        name = f"{point}: the forecast" if last else point
        named = last or number_ in (0, (n_points - 1) // 2)
        width = 2.6 if last else 1.5
        _line(figure, n_time + steps, values, name, color, width, showlegend=named)
    heading = f"Forecasts read at every depth, channel {channel}" if title == "" else title
    figure.update_xaxes(title={"text": "time (sample)"}, showgrid=False, zeroline=False)
    figure.update_yaxes(zeroline=False, nticks=6)
    above = style.label_above(figure, "units of the series")
    below = 60 + 22 * 3
    subtitle = f"series {at}; {result.heuristic}"
    style.finish(figure, heading, subtitle, plot_height=260, above=above, below=below)
    return marks.legend_below(figure, 50, 260)


def _line(
    figure: go.Figure, x: Any, y: Any, name: str, color: str, width: float, **more: Any
) -> None:
    said = f"{name}<br>sample %{{x}}: %{{y:.4g}}"
    marks.curve(figure, x, y, color, width, name=name, said=said, **more)


def _shade(depth: float) -> str:
    """A warm colour, paler towards the embedding."""
    pale, strong = (244, 214, 190), (200, 101, 27)
    mixed = (round(a + (b - a) * depth) for a, b in zip(pale, strong, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


@draw.register
@checked
def draw_similarity(result: Similarity, *, title: str | None = "") -> go.Figure:
    """Linear CKA between hook points."""
    rows, columns = hook_labels(result.hooks_a), hook_labels(result.hooks_b)

    def said(i: int, j: int) -> str:
        return (
            f"<b>{rows[i]} and {columns[j]}</b><br>CKA {number(result.values[i, j])}<br>series "
            f"shuffled {number(result.null[i, j])} (at most {number(result.null_high[i, j])})"
        )

    hover = marks.each_cell(result.values.shape, said)
    name_a, name_b = result.names
    heading = f"How alike layers are: {name_a}"
    same_axis = name_a == name_b
    if not same_axis:
        heading += f" and {name_b}"
    low = min(0.0, float(np.nanmin(result.values)))
    estimate = "debiased" if result.debiased else "plain"
    figure = heat_maps(
        [Panel("", result.values, hover)],
        Ticks("" if same_axis else name_a, rows),
        Ticks("" if same_axis else name_b, tuple(name.replace(" ", "<br>") for name in columns)),
        Scale(f"linear CKA ({estimate})", low, 1.0, diverging=False),
        title=heading if title == "" else title,
        subtitle=(
            f"{result.n_rows} {result.rows}; series shuffled: "
            f"{number(float(np.nanmean(result.null)))} on average"
        ),
    )
    return marks.title_at_edge(figure.update_xaxes(tickangle=0))


@draw.register
@checked
def draw_skip_cost(
    result: SkipCost,
    *,
    value: Literal["change", "accuracy", "changed"] = "change",
    title: str | None = "",
) -> go.Figure:
    """What skipping every run of layers does to the metric.

    Args:
        value: ``"change"`` of the metric, ``"accuracy"``, or ``"changed"`` (share of series that
            are given another class).
    """
    shown = getattr(result, value)
    n = len(shown)

    def said(*at: int) -> str:
        first, last = at
        if first > last:
            return ""
        which = f"layer {first}" if first == last else f"layers {first} to {last}"
        return (
            f"<b>without {which}</b><br>{result.metric}: {number(result.value[at])}<br>change "
            f"{number(result.change[at], True)} ({number(result.low[at], True)} to "
            f"{number(result.high[at], True)})<br>accuracy {number(result.accuracy[at])}"
        )

    hover = marks.each_cell((n, n), said)
    if value == "change":
        end = style.symmetric_limit(float(np.nanmax(np.abs(shown))))
        scale = Scale(f"change of {result.metric}", -end, end, better=result.better)
    else:
        label = "accuracy" if value == "accuracy" else "share of series with another class"
        scale = Scale(label, 0.0, 1.0, diverging=False)
    layers = tuple(f"L{layer}" for layer in range(n))
    figure = heat_maps(
        [Panel("", shown, hover)],
        Ticks("first skipped", layers),
        Ticks("last skipped", layers),
        scale,
        title="What skipping layers costs" if title == "" else title,
        subtitle=(
            f"{result.made.get('n_series', '?')} series; whole model "
            f"{number(result.full[0])}, accuracy {number(result.full[1])}"
        ),
    )
    return marks.title_at_edge(figure)


@draw.register
def draw_unit_match(result: UnitMatch, *, title: str | None = "") -> go.Figure:
    """Correlation of the matched neurons, largest first, beside the control's."""
    pairs = zip(result.unit_a, result.unit_b, strict=True)
    curves = {
        "matched neurons": (result.correlation, [f"{a} and {b}" for a, b in pairs]),
        "series in another order": (result.chance, None),
    }
    heading = f"{len(result.correlation)} matched neurons" if title == "" else title
    places = hook_labels(result.hooks) if result.hooks[0] != result.hooks[1] else result.hooks[:1]
    mean, share = result.correlation.mean(), result.share()
    subtitle = f"{' and '.join(places)}; mean {mean:.2f}, {share:.0%} above 0.7"
    return by_rank(curves, "neurons", "correlation", heading, subtitle)


def by_rank(
    curves: dict[str, tuple[np.ndarray, list[str] | None]],
    what: str,
    measure: str,
    title: str | None,
    subtitle: str,
) -> go.Figure:
    """Similarities of one-to-one pairs, largest first: the pairs found in blue, a control in grey.

    Args:
        curves: name -> similarities [match] and what each pair is, or None.
        what: is matched.
        measure: the similarity.
        title: of the figure.
        subtitle: a second line.
    """
    figure = go.Figure()
    colors = (style.BLUE, style.MUTED)
    for color, (name, (values, text)) in zip(colors, curves.items(), strict=True):
        said = (f"{what} %{{text}}: " if text else "") + "%{y:.3f}"
        rank = np.arange(1, len(values) + 1)
        marks.curve(figure, rank, values, color, name=name, text=text, said=said)
    figure.update_xaxes(title="pair, most similar first")
    figure.update_yaxes(title=measure)
    return style.finish(figure, title, subtitle, plot_height=280, above=30, left=56)
