"""Latents as figures: one latent on the series, all at a glance, interventions, matches.

A sparse feature graph: dictionaries as rows, latents as nodes, lines for what goes through.

How good a dictionary is, beside its controls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.depth import by_rank
from tstlens.figures.drawing import draw
from tstlens.figures.histories import histories
from tstlens.figures.words import hook_place, number, suffix, when
from tstlens.saes.graph import FeatureGraph
from tstlens.saes.reading.activity import Window, Windows
from tstlens.saes.reading.intervention import LatentEffect
from tstlens.saes.reading.matching import DictionaryMatch
from tstlens.saes.reading.result import Features
from tstlens.saes.scoring import Scores
from tstlens.saes.training import TrainingHistory


@draw.register
def draw_sae_training(result: TrainingHistory, *, title: str | None = "") -> go.Figure:
    """Losses, active latents and latents that fell silent over the steps of a training.

    Losses are sae-lens', of batches that are scaled as the training scales them.
    """
    losses = {name: name.replace("_", " ") for row in result.rows for name in row if "loss" in name}
    panels = {
        "loss": losses,
        "explained variance": {"explained_variance": "explained variance"},
        "active latents per position": {"l0": "active"},
        "silent latents": {"dead": "silent"},
    }
    heading = f"Training of {result.name}" if title == "" else title
    return histories(result.rows, panels, "step", heading, f"{result.rows[-1]['step']} steps")


MARK = "#f9dcc0"  # behind the samples of a window
MOST_LINES = 9  # classes or steps drawn of a dose response


@draw.register
def draw_features(
    result: Features,
    *,
    latent: int | None = None,
    series: int | None = None,
    channel: int | None = None,
    n: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """One latent's strongest windows, the latents over time in one series, or all at a glance.

    Args:
        latent: draw this one's strongest windows.
        series: draw this series, and below it latents x time, those that are strongest in it.
            None of both draws every latent as a point, by how often it is active and how much its
            removal changes the output.
        channel: of the series, in models that read each channel by itself; the one with the
            largest activation where None.
        n: windows (6), or latents (30).

    Raises:
        ArgumentError: a latent and a series at once, or a series or channel that there is not.
    """
    if series is not None:
        if latent is not None:
            raise ArgumentError("expected latent= (its windows) or series= (its latents), got both")
        return _over_time(result, series, channel, 30 if n is None else n, title)
    if channel is not None:
        raise ArgumentError(f"channel={channel} is of a series; give series= too")
    n = 6 if n is None else n
    if latent is not None:
        row: Any = result.table().loc[latent]
        said = [f"active at {row['density']:.2%} of positions"]
        if "class" in row and row["auc"] == row["auc"]:
            said.append(f"class {row['class']}: AUC {row['auc']:.2f}, q {number(row['q_class'])}")
        if row.get("confirmed"):
            said.append(f"follows {row['property']}: r {number(row['r_heldout'], True)} held out")
        heading = f"Latent {latent} of {result.hook}" if title is None else title
        return draw_windows(result.top_windows(latent, n), title=heading, subtitle=", ".join(said))
    table: Any = result.table()
    table = table[table["density"] > 0]
    against = "effect_size" if "effect_size" in table else "max"
    label = {"effect_size": "effect of removal (RMS change of the output)", "max": "max activation"}
    coloured = "auc" in table
    hover = [
        f"latent {index}<br>active at {row['density']:.2%}<br>{against.replace('_', ' ')} "
        f"{number(row[against])}"
        + (f"<br>class {row['class']}: AUC {row['auc']:.3f}" if coloured else "")
        + (f"<br>follows {row['property']}" if row.get("confirmed") else "")
        for index, row in table.iterrows()
    ]
    marker: dict[str, Any] = {"size": 7, "color": style.BLUE, "opacity": 0.8}
    if coloured:
        far = 2 * (table["auc"] - 0.5).abs()
        marker |= {"color": far, "coloraxis": "coloraxis"}
    figure = go.Figure()
    figure.add_scatter(
        x=table["density"], y=table[against], mode="markers", marker=marker, **marks.hovered(hover)
    )
    figure.update_xaxes(
        title="share of positions where active", type="log", tickformat="~%", dtick=1
    )
    figure.update_yaxes(title=label[against], rangemode="tozero")
    above = 0
    if coloured:
        axis = {"cmin": 0, "cmax": 1, "colorscale": style.SEQUENTIAL, "colorbar": {"len": 180}}
        figure.update_layout(coloraxis=axis)
        above = style.label_above(figure, "colour: distance of the best class' AUC from chance")
    heading = f"{len(table)} active latents of {result.hook}" if title is None else title
    return style.finish(figure, heading, plot_height=320, above=above, left=62)


def _over_time(
    result: Features, series: int, channel: int | None, n: int, title: str | None
) -> go.Figure:
    """A series, and below it what its strongest latents do over time."""
    activity, data = result.activity, result.data
    series = marks.row_of(series, len(data), "a series")
    if n < 1:
        raise ArgumentError(f"expected n of at least 1 latent, got {n}")
    by_channel = activity.n_channels > 1
    if channel is not None and not (by_channel and 0 <= channel < activity.n_channels):
        known = f"0..{activity.n_channels - 1}" if by_channel else "None (the trunk mixes channels)"
        raise ArgumentError(f"expected channel in {known}, got {channel}")
    per_series = activity.n_channels * activity.n_pos
    slots = slice(series * per_series, (series + 1) * per_series)
    found = (
        activity.values.tocsr()[slots].toarray().reshape(activity.n_channels, activity.n_pos, -1)
    )
    row = int(found.max((1, 2)).argmax()) if channel is None else channel
    here = found[row]  # [pos, latent]
    observed = activity.observed[slots].reshape(activity.n_channels, -1)[row]
    strongest = np.argsort(-here.max(0), kind="stable")
    shown = [int(one) for one in strongest[:n] if here[:, one].max() > 0]
    if not shown:
        raise ArgumentError(f"no latent is active in series {series}, so there is nothing to draw")
    shown.sort(key=lambda one: (int(here[:, one].argmax()), one))  # by when they are strongest
    values = np.where(observed[:, None], here, np.nan)[:, shown].T
    in_time = [at for at, (first, stop) in enumerate(result.cells) if stop > first]
    edges = [result.cells[at][0] - 0.5 for at in in_time] + [result.cells[in_time[-1]][1] - 0.5]
    above, below = 130, max(120, 15 * len(shown))
    gap = 16
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        row_heights=[above, below],
        vertical_spacing=gap / (above + below + gap),
    )
    lines = data.series[series].double().cpu().numpy()
    if data.mask is not None:
        lines = np.where(data.mask[series].cpu().numpy()[None], lines, np.nan)
    for at in [row] if by_channel else range(len(lines)):
        said = f"channel {at}, sample %{{x}}: %{{y:.3g}}"
        color = style.LINES[at % len(style.LINES)]
        marks.curve(
            figure, np.arange(lines.shape[1]), lines[at], color, 1.2, said=said, row=1, col=1
        )
    names = [str(one) for one in shown]
    trace = go.Heatmap(
        z=values[:, in_time],
        x=edges,
        y=list(range(len(shown))),
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertext=marks.each_cell(
            (len(shown), len(in_time)),
            lambda one, at: (
                f"<b>latent {names[one]}</b>, {when(result.cells[in_time[at]])}<br>"
                f"activation {number(float(values[one, in_time[at]]))}"
            ),
        ),
        hovertemplate="%{hovertext}<extra></extra>",
    )
    figure.add_trace(trace, row=2, col=1)
    step = -(-len(shown) * 12 // below)  # every label where there is room
    ticks: dict[str, Any] = {"tickmode": "array", "tickvals": list(range(0, len(shown), step))}
    ticks |= {"ticktext": names[::step], "autorange": "reversed", "title": {"text": "latent"}}
    figure.update_yaxes(**ticks, showgrid=False, zeroline=False, row=2, col=1)
    figure.update_yaxes(nticks=5, zeroline=False, row=1, col=1)
    ends = [-0.5, lines.shape[1] - 0.5]
    figure.update_xaxes(range=ends, showgrid=False, zeroline=False)
    figure.update_xaxes(title={"text": "time (sample)"}, row=2, col=1)
    most = float(np.nanmax(values))
    bar = {"len": min(below, 200), "y": below / (above + below + gap)}
    axis = {"cmin": 0, "cmax": most, "colorscale": style.SEQUENTIAL, "colorbar": bar}
    figure.update_layout(coloraxis=axis)
    label = "" if data.labels is None else f" (class {data.class_names[int(data.labels[series])]})"
    of_channel = f", channel {row}" if by_channel else ""
    heading = f"Latents over series {series}{of_channel}{label}" if title is None else title
    active = int((here > 0).any(0).sum())
    subtitle = (
        f"{len(shown)} strongest of {active} active {result.kind}, by when they are strongest; "
        f"colour: activation; {result.hook}"
    )
    return style.finish(
        figure, heading, subtitle, plot_height=above + below + gap, above=8, left=58
    )


@draw.register
def draw_windows(result: Windows, *, title: str | None = None, subtitle: str = "") -> go.Figure:
    """The windows where a latent is strongest, shaded on their series, activation below.

    Raises:
        ArgumentError: the latent has no windows: it is never active.
    """
    if not len(result):
        raise ArgumentError(
            f"latent {result.latent} is never active on these series, so there is nothing to draw"
        )
    headings = []
    for window in result.windows:
        channel = "" if window.channel is None else f", channel {window.channel}"
        label = "" if window.label is None else f" (class {style.shortened(window.label, 12)})"
        headings += [f"series {window.series}{channel}{label}: {number(window.activation)}", ""]
    count = len(result)
    figure = make_subplots(
        rows=2 * count,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.75, 0.25] * count,
        vertical_spacing=min(0.2 / count, 0.06),
        subplot_titles=headings,
    )
    largest = max(window.activation for window in result.windows)
    drawn = [
        window.values if window.channel is None else window.values[window.channel]
        for window in result.windows
    ]
    low, high = min(map(np.nanmin, drawn)), max(map(np.nanmax, drawn))
    margin = 0.05 * (high - low) or 1.0
    limits = [float(low - margin), float(high + margin)]
    for index, window in enumerate(result.windows):
        _window(figure, window, 2 * index + 1, largest, limits)
    figure.update_annotations(x=0, xanchor="left", font={"size": 11, "color": style.MUTED})
    figure.update_xaxes(title="time (sample)", row=2 * count, col=1)
    figure.update_layout(showlegend=False)
    heading = f"Latent {result.latent}" if title is None else title
    return style.finish(figure, heading, subtitle, plot_height=150 * count, above=22)


def _window(figure: Any, window: Window, row: int, largest: float, limits: list[float]) -> None:
    channels = range(len(window.values)) if window.channel is None else [window.channel]
    for channel in channels:
        color = style.LINES[channel % len(style.LINES)]
        said = f"channel {channel}, sample %{{x}}: %{{y:.3g}}"
        values = window.values[channel]
        marks.curve(figure, None, values, color, 1.1, said=said, row=row, col=1)
    figure.add_vrect(
        window.start - 0.5, window.stop - 0.5, fillcolor=MARK, line_width=0, layer="below",
        row=row, col=1,
    )  # fmt: skip
    cells = window.cells
    bars = go.Bar(
        x=[(first + last - 1) / 2 for first, last in cells],
        width=[last - first for first, last in cells],
        y=window.over_time,
        marker_color=[style.ORANGE if p == window.pos else "#9fb8cf" for p in range(len(cells))],
        customdata=[when(cell) for cell in cells],
        hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
    )
    figure.add_trace(bars, row=row + 1, col=1)
    figure.update_yaxes(range=[0, largest * 1.05], nticks=2, row=row + 1, col=1)
    figure.update_yaxes(nticks=4, range=limits, row=row, col=1)


@draw.register
def draw_latent_effect(
    result: LatentEffect, *, measure: str | None = None, title: str | None = None
) -> go.Figure:
    """Change of the output against the dose, with the range of random latents behind it.

    Args:
        measure: "probability", "logit" or "forecast"; see :meth:`LatentEffect.change`.
    """
    frame: Any = result.to_dataframe(measure)
    axis = frame.columns[1]
    size = frame.assign(size=frame["change"].abs()).groupby(axis, sort=False)["size"].max()
    shown = [name for name in size.index if name in set(size.nlargest(MOST_LINES).index)]
    figure = go.Figure()
    ends = frame.groupby("dose")[["control_low", "control_high"]]
    low, high = ends.min()["control_low"], ends.max()["control_high"]
    if len(result.control_latents):
        random = {"name": f"{len(result.control_latents)} random latents", "showlegend": True}
        marks.band(figure, low.index, low.to_numpy(), high.to_numpy(), style.GRID, **random)
    for index, name in enumerate(shown):
        part = frame[frame[axis] == name]
        change, low, high = (part[key] for key in ("change", "low", "high"))
        color = style.LINES[index % len(style.LINES)]
        error = marks.whiskers(change, low, high, color, 1, 2)
        marks.curve(
            figure,
            part["dose"],
            change,
            color,
            1.6,
            name=f"{axis} {style.shortened(str(name), 14)}",
            said=f"{axis} {name}, dose %{{x:g}}: %{{y:+.3g}}",
            dots=6,
            error_y=error,
        )
    what = "forecast" if result.task == "forecast" else measure or "probability"
    dose = (
        "share removed"
        if result.kind == "ablation"
        else f"added, in units of activation {number(result.unit)}"
    )
    figure.add_hline(0, line={"color": style.FAINT, "width": 1})
    figure.update_xaxes(title=dose)
    figure.update_yaxes(title=f"mean change of {what}")
    rows = -(-(len(shown) + 1) // 3)
    heading = f"{result.kind.capitalize()} of latent {result.latent}" if title is None else title
    subtitle = f"{len(result.series)} series; grey: range of the random latents over all outputs"
    return style.finish(figure, heading, subtitle, plot_height=300, above=22 * rows + 8, left=66)


@draw.register
def draw_match(result: DictionaryMatch, *, title: str | None = None) -> go.Figure:
    """Similarity of the matched latents, largest first, beside the control's."""
    pairs = zip(result.latent_a, result.latent_b, strict=True)
    curves = {
        "matched latents": (result.similarity, [f"{a} and {b}" for a, b in pairs]),
        result.control: (result.chance, None),
    }
    kind = "cosine of directions" if result.by == "decoder" else "correlation of activations"
    heading = f"{len(result.similarity)} matched latents" if title is None else title
    subtitle = f"mean {result.similarity.mean():.2f}, {result.share():.0%} above 0.7"
    return by_rank(curves, "latents", kind, heading, subtitle)


_ROW = 150  # pixels between two dictionaries
_WIDEST = 6.0  # pixels of the strongest line


@draw.register
def draw_feature_graph(graph: FeatureGraph, *, title: str | None = "") -> go.Figure:
    """The kept edges and their latents: the input's side at the bottom, the metric at the top.

    Blue improves the metric, red worsens it (blue is more where neither direction is better); lines
    are as wide as the root of their effect, nodes are coloured by theirs. Squares are what a
    dictionary misses. Nodes without a kept edge are drawn pale. Latents of the last dictionary are
    joined to the metric by their own effect.

    What can mislead: everything here is an estimate by gradients; the line below the title says how
    well it agrees with the edges that were measured.

    Raises:
        ArgumentError: the graph has no latents with an effect.
    """
    shown = [index for index, node in enumerate(graph.nodes) if not node.control]
    if not shown:
        raise ArgumentError("expected a graph with latents, got one without: nothing had an effect")
    effects: Any = graph.node_effects.mean(0).double().numpy()
    weights: Any = graph.edge_effects.mean(0).double().numpy()
    kept = graph.kept.numpy()
    n_layers = len(graph.hooks)
    places = _places(graph, shown, weights, kept)
    lines = [(a, b, float(weights[a, b])) for a, b in np.argwhere(kept).tolist()]
    figure = go.Figure()
    largest = max((abs(weight) for _, _, weight in lines), default=1.0) or 1.0
    for first, then, weight in sorted(lines, key=lambda line: abs(line[2])):
        hover = f"{_label(graph, first)} → {_label(graph, then)}<br>{_amount(graph, weight)}"
        exact = float(graph.exact_edges[:, first, then].mean())
        hover += "" if exact != exact else f"<br>measured {_amount(graph, exact)}"
        said = hover, style.side(weight, graph.better)
        _line(figure, places[first], places[then], weight, largest, said)
    top = (0.5, float(n_layers))
    last = [index for index in shown if graph.nodes[index].layer == n_layers - 1]
    most = max(abs(effects[index]) for index in last) or 1.0 if last else 1.0
    for index in last:
        hover = f"{_label(graph, index)} → {graph.metric}<br>{_amount(graph, effects[index])}"
        said = hover, style.side(effects[index], graph.better)
        _line(figure, places[index], top, effects[index], most, said)
    joined = set(np.argwhere(kept).ravel().tolist())
    _nodes(figure, graph, shown, places, effects, joined)
    name = graph.metric.removesuffix(" of the target class")
    figure.add_scatter(
        x=[top[0]],
        y=[top[1]],
        mode="markers+text",
        marker={"size": 15, "color": style.INK},
        text=[name],
        textposition="top center",
        textfont={"size": 13},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
    for layer, hook in enumerate(graph.hooks):
        figure.add_annotation(
            x=0, y=layer - 0.3, text=hook_place(hook), showarrow=False, xanchor="left",
            font={"size": 11, "color": style.MUTED}, bgcolor=style.PAPER,
        )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.02, 1.02], fixedrange=True)
    figure.update_yaxes(visible=False, range=[-0.45, n_layers + 0.35], fixedrange=True)
    unit = suffix(graph.unit)
    subtitle = (
        f"{len(graph.value)} series, baseline {graph.baseline}; "
        f"{style.sides(better=graph.better)}; width: root of the effect, between latents up to "
        f"{number(largest)}{unit}"
    )
    found = graph.agreement().loc["edges"]
    if found["n"] > 1:
        subtitle += f"; {int(found['n'])} edges measured: Pearson {found['pearson']:.2f}"
    heading = f"Latents behind the {name}" if title == "" else title
    height = int(_ROW * (n_layers + 0.6))
    return style.finish(figure, heading, subtitle, plot_height=height, below=14, left=14)


def _label(graph: FeatureGraph, index: int) -> str:
    node = graph.nodes[index]
    what = "the error" if node.latent is None else f"latent {node.latent}"
    return f"{what} of {node.hook}"


def _amount(graph: FeatureGraph, value: float) -> str:
    return f"{number(float(value), True)}{suffix(graph.unit)}"


def _places(
    graph: FeatureGraph, shown: list[int], weights: np.ndarray, kept: np.ndarray
) -> dict[int, tuple[float, float]]:
    """x from 0 to 1, y the layer; sorted so that lines cross less (by the mean of the ends)."""
    layers = [
        [index for index in shown if graph.nodes[index].layer == layer]
        for layer in range(len(graph.hooks))
    ]
    size = np.where(kept, np.abs(np.nan_to_num(weights)), 0)
    size = size + size.T
    x = {index: (at + 0.5) / len(layer) for layer in layers for at, index in enumerate(layer)}
    for _ in range(8):
        for layer in layers:
            pull = {}
            for index in layer:
                others = [o for o in shown if graph.nodes[o].layer != graph.nodes[index].layer]
                force = size[index, others]
                centre = np.dot(force, [x[o] for o in others]) / force.sum() if force.sum() else 0
                pull[index] = centre if force.sum() else x[index]
            for at, index in enumerate(sorted(layer, key=lambda one: pull[one])):
                x[index] = (at + 0.5) / len(layer)
    return {index: (x[index], float(graph.nodes[index].layer)) for index in shown}


def _line(
    figure: go.Figure,
    start: tuple[float, float],
    stop: tuple[float, float],
    weight: float,
    largest: float,
    said: tuple[str, str],
) -> None:
    width = max(0.6, _WIDEST * (abs(weight) / largest) ** 0.5)
    x, y = marks.strand(start, stop)
    text, color = said
    opacity = min(0.8, 0.15 + 0.12 * width)
    more = {"text": text, "opacity": opacity}
    marks.curve(figure, x, y, color, width, said="%{text}", **more)


def _nodes(
    figure: go.Figure,
    graph: FeatureGraph,
    shown: list[int],
    places: dict[int, tuple[float, float]],
    effects: np.ndarray,
    joined: set[int],
) -> None:
    hover = []
    for index in shown:
        text = f"<b>{_label(graph, index)}</b><br>effect {_amount(graph, effects[index])}"
        exact = float(graph.exact_nodes[:, index].mean())
        hover.append(text + ("" if exact != exact else f"<br>measured {_amount(graph, exact)}"))
    limit = style.symmetric_limit(float(np.abs(effects[shown]).max()))
    nodes = [graph.nodes[index] for index in shown]
    crowded = max(sum(node.layer == layer for node in nodes) for layer in range(len(graph.hooks)))
    size = 26 if crowded <= 13 else 20 if crowded <= 18 else 12
    marker: dict[str, Any] = {
        "symbol": ["square" if node.latent is None else "circle" for node in nodes],
        "size": size,
        "color": effects[shown],
        "colorscale": style.diverging(graph.better, pale=True),
        "cmin": -limit,
        "cmax": limit,
        "opacity": [1.0 if index in joined else 0.45 for index in shown],
        "line": {"color": style.INK, "width": 1.1},
    }
    # What is below a half-transparent node must not show through it.
    x, y = zip(*(places[index] for index in shown), strict=True)
    marks.dots(figure, x, y, style.PAPER, size, look={"symbol": marker["symbol"]})
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers+text",
        marker=marker,
        text=["error" if node.latent is None else node.label for node in nodes]
        if size > 12
        else "",
        textfont={"size": 9},
        showlegend=False,
        cliponaxis=False,
        **marks.hovered(hover),
    )


_COLOURS = {"trained": style.BLUE, "neurons": style.ORANGE}
_GREYS = ("#5d6b7a", "#a3adb8")  # of the random dictionaries


@draw.register
def draw_scores(scores: Scores, *, title: str | None = "") -> go.Figure:
    """Explained variance, the task with each dictionary spliced in, and how often latents fire.

    Each measure of the task has three lines: the model as it is (solid), with the activation at
    its mean (dashed) and at zero (dotted). Where these are close together the task says little
    about a dictionary.
    """
    names = [row.name for row in scores.rows]
    colours = _colours(names)
    measures = list(scores.task["original"])
    headings = ["explained variance", *[measure.replace("_", " ") for measure in measures]]
    figure = make_subplots(
        rows=len(headings) + 1,
        cols=1,
        subplot_titles=[*headings, "latents by how often they are active"],
        vertical_spacing=0.13 if len(headings) < 3 else 0.1,
        row_heights=[1.0] * len(headings) + [1.5],
    )
    for row, heading in enumerate(headings, start=1):
        values = [
            part.explained_variance if row == 1 else part.task[measures[row - 2]]
            for part in scores.rows
        ]
        drawn = marks.measured(figure, names, values, heading, colours, row == 1, row)
        if row == 1:
            figure.update_xaxes(range=[min(0.0, *drawn), 1.02], row=row, col=1)
            continue
        for kind, dash in (("original", "solid"), ("mean", "dash"), ("zero", "dot")):
            figure.add_vline(
                x=scores.task[kind][measures[row - 2]],
                line={"color": style.INK, "width": 1.2, "dash": dash},
                row=row,  # pyright: ignore[reportArgumentType]
                col=1,  # pyright: ignore[reportArgumentType]
            )
    histogram: Any = scores.density_histogram()
    for name, colour in zip(names, colours, strict=True):
        part = histogram[histogram["dictionary"] == name]
        figure.add_scatter(
            x=10 ** part["log10_density"],
            y=part["latents"],
            mode="lines",
            line={"color": colour, "width": 2, "shape": "hvh"},
            name=name,
            showlegend=False,
            row=len(headings) + 1,
            col=1,
            **marks.hovered(f"{name}, from %{{x:.2%}}: %{{y}} latents"),
        )
    figure.update_xaxes(
        type="log", tickformat="~%", dtick=1, title="share of positions",
        row=len(headings) + 1, col=1,
    )  # fmt: skip
    figure.update_annotations(x=0, xanchor="left", font={"size": 11, "color": style.MUTED})
    trained = scores.trained
    subtitle = (
        f"{trained.n_latents} latents, {trained.l0:.1f} active at a time, {trained.n_dead} never; "
        f"{scores.data}, {scores.n_activations:,} activations; lines: the model as it is (solid), "
        "mean (dashed), zero (dotted)"
    )
    heading = f"Dictionary at {scores.hook}" if title == "" else title
    left = style.room_for(names) + 4
    height = 110 * len(headings) + 190
    return style.finish(figure, heading, subtitle, plot_height=height, above=20, left=left)


def _colours(names: list[str]) -> list[str]:
    greys = iter(_GREYS * len(names))
    return [_COLOURS.get(name) or next(greys) for name in names]
