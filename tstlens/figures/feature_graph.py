"""A sparse feature graph: dictionaries as rows, latents as nodes, lines for what goes through."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.words import number, site_title
from tstlens.saes.graph import FeatureGraph

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

    Args:
        graph: what :func:`tstlens.saes.feature_graph` returned.
        title: "" for one made from the graph, None for none.

    Returns:
        A plotly figure.

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
            x=0, y=layer - 0.3, text=_place_name(hook), showarrow=False, xanchor="left",
            font={"size": 11, "color": style.MUTED}, bgcolor=style.PAPER,
        )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.02, 1.02], fixedrange=True)
    figure.update_yaxes(visible=False, range=[-0.45, n_layers + 0.35], fixedrange=True)
    unit = "" if graph.unit in ("probability", "value") else f" {graph.unit}"
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


def _place_name(hook: str) -> str:
    """``blocks.0.hook_mlp_out`` in words: "the MLP output, layer 0"."""
    parts = hook.split(".")
    name = site_title(parts[-1].removeprefix("hook_"))
    return f"{name}, layer {parts[1]}" if parts[0] == "blocks" else name


def _label(graph: FeatureGraph, index: int) -> str:
    node = graph.nodes[index]
    what = "the error" if node.latent is None else f"latent {node.latent}"
    return f"{what} of {node.hook}"


def _amount(graph: FeatureGraph, value: float) -> str:
    unit = "" if graph.unit in ("probability", "value") else f" {graph.unit}"
    return f"{number(float(value), True)}{unit}"


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
    t = np.linspace(0, 1, 25)
    bend = t * t * (3 - 2 * t)
    figure.add_scatter(
        x=start[0] + (stop[0] - start[0]) * bend,
        y=start[1] + (stop[1] - start[1]) * t,
        mode="lines",
        line={"color": said[1], "width": width},
        opacity=min(0.8, 0.15 + 0.12 * width),
        text=said[0],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


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
    figure.add_scatter(
        x=[places[index][0] for index in shown],
        y=[places[index][1] for index in shown],
        mode="markers",
        marker={"symbol": marker["symbol"], "size": size, "color": style.PAPER},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.add_scatter(
        x=[places[index][0] for index in shown],
        y=[places[index][1] for index in shown],
        mode="markers+text",
        marker=marker,
        text=["error" if node.latent is None else node.label for node in nodes]
        if size > 12
        else "",
        textfont={"size": 9},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
        cliponaxis=False,
    )
