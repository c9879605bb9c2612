"""A circuit in layers, from time at the bottom to the class at the top.

Which heads listen to which: the influence matrix as a map.

How much of the model's behaviour the strongest edges keep, beside random ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Count, Positive, checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.statistics import ranking
from tstlens.figures.words import number, suffix
from tstlens.patching import Influence
from tstlens.patching.circuits import Circuit, EdgeEffects, Faithfulness
from tstlens.patching.circuits.circuit import label_of

_LEVELS = 10  # stops of the threshold slider
_ROW = 92  # pixels between two layers
_READS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class _Line:
    """An edge as it is drawn: from place to place, with its weight and what hovering says."""

    start: tuple[float, float]
    stop: tuple[float, float]
    weight: float
    hover: str
    ends: tuple[str, str]
    level: int


@draw.register
@checked
def draw_circuit(circuit: Circuit, *, title: str | None = "", levels: Count = _LEVELS) -> go.Figure:
    """The circuit in layers: time at the bottom, heads and MLPs by layer, the class at the top.

    Lines are as wide as the root of their weight; blue improves the metric when the clean
    contribution is patched in, red worsens it (blue is more where neither direction is better). A
    head's queries, keys and values share one line (hover tells them apart). The slider hides weak
    edges, and nodes that are then without any.

    What can mislead: a weight is the effect of one edge by itself. What the edges do together is
    what ``circuit.faithfulness`` measures.

    Args:
        levels: stops of the threshold slider.

    Raises:
        ArgumentError: the circuit has no edges.

    Example:
        >>> import torch
        >>> from tstlens.patching.circuits import ComponentGraph
        >>> graph = ComponentGraph(n_layers=1, n_heads=2)
        >>> scores = torch.linspace(-1, 1, len(graph.edges))
        >>> circuit = Circuit(graph, scores, scores.abs() > 0.5, "logit", "logit")
        >>> len(circuit.figure().layout.sliders[0].steps) > 1
        True
    """
    if not len(circuit):
        raise ArgumentError(
            "expected a circuit with edges, got one without; choose a larger budget"
        )
    graph = circuit.graph
    places = _places(circuit)
    sizes = np.array([abs(facts["weight"]) for _, _, facts in graph.edges(data=True)])
    floors = _floors(sizes, levels)
    lines = [
        _line(circuit, places, start, stop, facts, floors)
        for start, stop, facts in graph.edges(data=True)
    ]
    figure = go.Figure()
    level_of_trace: list[int] = []
    for level in range(len(floors)):
        for positive in (False, True):
            some = [
                line for line in lines if line.level == level and (line.weight >= 0) is positive
            ]
            colour = style.side(1.0 if positive else -1.0, circuit.better)
            for trace in _edge_traces(some, colour, float(sizes.max())):
                figure.add_trace(trace)
                level_of_trace.append(level)
    for level in range(len(floors)):
        for trace in _node_traces(circuit, places, lines, level):
            figure.add_trace(trace)
            level_of_trace.append(level)
    _axes(figure, circuit, places)
    unit = suffix(circuit.unit)
    if len(floors) > 1:
        figure.update_layout(sliders=[_slider(floors, lines, level_of_trace, unit)])
    heading = f"Circuit for {style.shortened(circuit.output, 27)}" if title == "" else title
    share = 100 * len(circuit) / len(circuit.kept)
    subtitle = (
        f"{len(circuit)} of {len(circuit.kept)} edges ({share:.2g} %); "
        f"{style.sides(circuit.metric.removesuffix(' of the target class'), circuit.better)}; "
        f"width: root of the change, up to {number(sizes.max())}{unit}"
    )
    rows = circuit.components.n_layers + 1.2 + bool(circuit.components.n_channels)
    return style.finish(
        figure,
        heading,
        subtitle,
        plot_height=int(_ROW * (rows + 0.9)),
        below=46 + (86 if len(floors) > 1 else 0),
        left=62,
    )


def _floors(sizes: np.ndarray, levels: int) -> list[float]:
    """Weights from which each stop of the slider shows edges, in even ratios of their number."""
    counts = np.geomspace(len(sizes), 1, levels).round().astype(int)
    return sorted(set(np.sort(sizes)[len(sizes) - counts].tolist()))


def _places(circuit: Circuit) -> dict[str, tuple[float, float]]:
    """Where each node stands: x from 0 to 1, y in rows."""
    graph, places = circuit.components, {}
    for node in circuit.nodes:
        layer, index = node.layer or 0, node.index or 0
        if node.kind == "channel":
            place = ((index + 0.5) / graph.n_channels, -1.0)
        elif node.kind == "pos":
            place = ((index + 0.5) / graph.n_pos, 0.0)
        elif node.kind == "embed":
            place = (0.5, 0.0)
        elif node.kind == "head":
            place = ((index + 0.5) / (graph.n_heads + 1), layer + 1.0)
        elif node.kind == "mlp":
            place = ((graph.n_heads + 0.5) / (graph.n_heads + 1), layer + 1.4)
        else:
            place = (0.5, graph.n_layers + 1.2)
        places[node.name] = place
    return places


def _line(
    circuit: Circuit,
    places: dict[str, tuple[float, float]],
    start: str,
    stop: str,
    facts: dict[str, Any],
    floors: list[float],
) -> _Line:
    unit = suffix(circuit.unit)
    labels = _labels(circuit)
    hover = f"<b>{labels[start]} → {labels[stop]}</b><br>{number(facts['weight'], True)}{unit}"
    for part, word in _READS.items():
        if part in facts:
            hover += f"<br>into its {word}: {number(facts[part], True)}{unit}"
    level = int(np.searchsorted(floors, abs(facts["weight"]), side="right")) - 1
    return _Line(places[start], places[stop], facts["weight"], hover, (start, stop), max(level, 0))


def _labels(circuit: Circuit) -> dict[str, str]:
    return {node.name: label_of(circuit, node) for node in circuit.nodes}


def _edge_traces(lines: list[_Line], colour: str, largest: float) -> list[Any]:
    """Lines of about the same width in one trace, and the points that answer to hovering."""
    by_width: dict[float, list[_Line]] = {}
    for line in lines:
        by_width.setdefault(round(2 * _width(line, largest)) / 2, []).append(line)
    return [
        trace for width in sorted(by_width) for trace in _strands(by_width[width], width, colour)
    ]


def _width(line: _Line, largest: float) -> float:
    """Pixels, growing with the root of the weight: one strong edge must not flatten the others."""
    return 0.3 + 7 * (abs(line.weight) / (largest or 1.0)) ** 0.5


def _strands(lines: list[_Line], width: float, colour: str) -> list[Any]:
    xs, ys, middle = [], [], []
    for line in lines:
        x, y = marks.strand(line.start, line.stop)
        xs += [*x, None]
        ys += [*y, None]
        middle += [(x[at], y[at]) for at in (8, 16)]
    drawn = go.Scatter(
        x=xs,
        y=ys,
        mode="lines",
        line={"color": colour, "width": max(width, 0.7)},
        opacity=min(0.85, 0.15 + 0.12 * width),
        hoverinfo="skip",
        showlegend=False,
    )
    points = go.Scatter(
        x=[x for x, _ in middle],
        y=[y for _, y in middle],
        mode="markers",
        marker={"size": 12, "opacity": 0},
        **marks.hovered([line.hover for line in lines for _ in range(2)]),
        showlegend=False,
    )
    return [drawn, points]


def _node_traces(
    circuit: Circuit, places: dict[str, tuple[float, float]], lines: list[_Line], level: int
) -> list[Any]:
    """Nodes whose strongest edge is of this level."""
    strongest: dict[str, int] = {}
    for line in lines:
        for end in line.ends:
            strongest[end] = max(strongest.get(end, 0), line.level)
    table = circuit.node_table().set_index("node")
    shown = [node for node in circuit.nodes if strongest.get(node.name) == level]
    unit = suffix(circuit.unit)
    crowded = circuit.components.n_heads > 12
    dots = max(4.0, min(9.0, 240 / max(1, circuit.components.n_pos)))  # they fit a phone
    traces = []
    for kind, symbol, size in (
        ("small", "circle", dots),
        ("head", "circle", 12 if crowded else 25),
        ("mlp", "square", 26),
        ("output", "circle", 16),
    ):
        own = (kind,) if kind != "small" else ("channel", "pos", "embed")
        nodes = [node for node in shown if node.kind in own]
        if not nodes:
            continue
        text = {
            "small": [""] * len(nodes),
            "head": ["" if crowded else f"H{node.index}" for node in nodes],
            "mlp": ["MLP"] * len(nodes),
            "output": [style.shortened(circuit.output, 30)],
        }[kind]
        hover = []
        for node in nodes:
            row = table.loc[node.name]
            parts = [f"<b>{row['label']}</b>"]
            for way in ("in", "out"):
                count, total = row[f"edges_{way}"], number(row[f"weight_{way}"], True)
                if count:
                    edges = "edge" if count == 1 else "edges"
                    parts.append(f"{count} {edges} {way}, together {total}{unit}")
            hover.append("<br>".join(parts))
        traces.append(
            go.Scatter(
                x=[places[node.name][0] for node in nodes],
                y=[places[node.name][1] for node in nodes],
                mode="markers+text",
                marker={
                    "symbol": symbol,
                    "size": size,
                    "color": style.INK if kind in ("small", "output") else style.PAPER,
                    "line": {"color": style.INK, "width": 1.3},
                },
                text=text,
                textposition="top center" if kind == "output" else "middle center",
                textfont={"size": 13 if kind == "output" else 10 if kind == "head" else 9},
                **marks.hovered(hover),
                showlegend=False,
                cliponaxis=False,
            )
        )
    return traces


def _axes(figure: go.Figure, circuit: Circuit, places: dict[str, tuple[float, float]]) -> None:
    graph = circuit.components
    names = {0.0: "time" if graph.n_pos else "input"}
    if graph.n_channels:
        names[-1.0] = "channels"
    names |= {layer + 1.0: f"layer {layer}" for layer in range(graph.n_layers)}
    lowest = min(y for _, y in places.values())
    bottom = min(0.0, lowest)
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(names),
        ticktext=list(names.values()),
        range=[bottom - 0.3, graph.n_layers + 1.75],
        showgrid=True,
        zeroline=False,
        fixedrange=True,
    )
    ticks: dict[str, Any] = {"tickvals": []}
    if graph.n_channels:
        step = max(1, -(-graph.n_channels // 12))
        shown = range(0, graph.n_channels, step)
        ticks = {
            "tickvals": [(channel + 0.5) / graph.n_channels for channel in shown],
            "ticktext": [str(channel) for channel in shown],
            "title": {"text": "channel (bottom row); time runs left to right above it"},
        }
    elif graph.n_pos:
        step = max(1, -(-graph.n_pos // 9))
        shown = range(0, graph.n_pos, step)
        cells = circuit.time_cells
        ticks = {
            "tickvals": [(pos + 0.5) / graph.n_pos for pos in shown],
            "ticktext": [str(pos if cells is None else cells[pos][0]) for pos in shown],
            "title": {"text": "position" if cells is None else "time (sample)"},
        }
    figure.update_xaxes(
        range=[-0.01, 1.01], showgrid=False, zeroline=False, fixedrange=True, **ticks
    )


def _slider(
    floors: list[float], lines: list[_Line], level_of_trace: list[int], unit: str
) -> dict[str, Any]:
    steps = []
    for level, floor in enumerate(floors):
        n_shown = sum(line.level >= level for line in lines)
        steps.append(
            {
                "method": "restyle",
                "args": [{"visible": [own >= level for own in level_of_trace]}],
                "label": f"{number(floor)}{unit}: {n_shown} line{'s' if n_shown > 1 else ''}",
            }
        )
    return {
        "active": 0,
        "steps": steps,
        "x": 0,
        "len": 1,
        "y": 0,
        "yanchor": "top",
        "pad": {"t": 62, "b": 0, "l": 0, "r": 8},
        "ticklen": 0,
        "minorticklen": 0,
        "font": {"size": 1, "color": "rgba(0,0,0,0)"},
        "currentvalue": {
            "prefix": "weights of at least ",
            "font": {"size": 12, "color": style.MUTED},
            "xanchor": "left",
            "offset": 8,
        },
        "bgcolor": style.GRID,
        "bordercolor": style.FAINT,
    }


@draw.register
@checked
def draw_edge_effects(
    effects: EdgeEffects, *, n: Count = 20, title: str | None = "Strongest edges"
) -> go.Figure:
    """The n edges with the largest mean effect: dot and interval over pairs, a tick per pair."""
    return ranking(effects, n, title=title)


_LABELS = {
    "normalized": "change as a share of the listener's own gap (root mean square)",
    "signed": "share of the listener's gap closed",
    "mean_squared": "mean squared change of what the listener writes",
}


@draw.register
@checked
def draw_influence(
    result: Influence,
    *,
    kind: Literal["signed", "normalized", "mean_squared"] = "signed",
    pair: int | None = None,
    title: str | None = "",
    limits: Positive | None = None,
) -> go.Figure:
    """Patched heads down, listening heads across; blank where the listener does not come later.

    What can mislead: influence runs along all routes, so a dark cell is no edge; and what moves a
    head need not move the output.

    Args:
        kind: "signed" (share of the listener's gap closed), "normalized" (size of the change
            against that gap) or "mean_squared".
        pair: show this pair only; None for the mean over pairs.
        limits: the end of the colour scale.

    Raises:
        ArgumentError: no such pair, or a single layer.
    """
    if "pair" not in result.axes and pair is not None:
        raise ArgumentError(f"pair={pair}: the result was averaged over pairs before")
    if pair is None:
        one = result.mean()
    else:
        row = marks.row_of(pair, result.n_pairs, "pair")
        at = slice(row, row + 1)
        one = Influence(
            result.values[at], result.projection[at], result.gap[at], result.axes, result.unit, 1
        ).mean()
    chosen = {"normalized": one.normalized, "signed": one.signed}
    values = (chosen[kind]() if kind in chosen else one.values).double().cpu().numpy()
    n_layers, n_units = values.shape[:2]
    if n_layers < 2:
        raise ArgumentError("expected at least two layers: heads of one layer do not influence")
    letter = "H" if result.unit == "head" else "S"
    names = [f"L{layer}{letter}{unit}" for layer in range(n_layers) for unit in range(n_units)]
    square = values.reshape(n_layers * n_units, n_layers * n_units)
    layer = np.arange(len(names)) // n_units
    square = np.where(layer[:, None] < layer[None], square, np.nan)[:-n_units, n_units:]
    rows, columns = names[:-n_units], names[n_units:]

    def said(i: int, j: int) -> str:
        value = float(square[i, j])
        if value != value:
            return f"{columns[j]} does not come after {rows[i]}"
        return f"<b>{rows[i]} → {columns[j]}</b><br>" + number(value, signed=kind == "signed")

    hover = marks.each_cell(square.shape, said)
    known = square[np.isfinite(square)]
    end = limits or float(np.abs(known).max(initial=0.0)) or 1.0
    scale = Scale(_LABELS[kind], -end if kind == "signed" else 0.0, end, kind == "signed")
    heading = f"What patching one {result.unit} does to later ones" if title == "" else title
    which = f"pair {pair}" if pair is not None else f"mean over {result.n_pairs} pairs"
    return heat_maps(
        [Panel("", square, hover)],
        Ticks(f"patched {result.unit}", tuple(rows)),
        Ticks(f"listening {result.unit}", tuple(columns)),
        scale,
        title=heading,
        subtitle=which,
    )


@draw.register
@checked
def draw_faithfulness(result: Faithfulness, *, title: str | None = "") -> go.Figure:
    """Faithfulness against the share of edges kept, beside random orders of edges.

    Example:
        >>> import torch
        >>> zeros, ones = torch.zeros(1), torch.ones(1)
        >>> result = Faithfulness(torch.tensor([[0.0, 0.8, 1.0]]), (0.01, 0.1, 1.0), (1, 10, 100),
        ...     zeros, ones, torch.tensor([0.6]), 5, torch.zeros(0, 1, 3), "logit", "logit")
        >>> result.figure().layout.xaxis.type
        'log'
    """
    percent = [100 * share for share in result.fractions]
    figure = go.Figure()
    figure.add_hline(y=1, line={"color": style.FAINT, "width": 1.5, "dash": "dot"})
    figure.add_hline(y=0, line={"color": style.FAINT, "width": 1.5})
    if len(result.random):
        curves = result.random_curves.double().cpu().numpy()
        for curve in curves:
            marks.curve(figure, percent, curve, style.FAINT, 1)
        random: dict[str, Any] = {"name": f"random edges ({len(curves)} orders)"}
        random["said"] = "%{x:.3g} % of edges at random<br>%{y:.3f}"
        marks.curve(figure, percent, curves.mean(0), style.MUTED, **random)
    curve = result.curve.double().cpu().numpy()
    said = [
        f"<b>{share:.3g} % of edges ({count})</b><br>faithfulness {value:.3f}"
        for share, count, value in zip(percent, result.n_edges, curve, strict=True)
    ]
    strongest = {"name": "strongest edges", "said": said, "dots": 6}
    marks.curve(figure, percent, curve, style.BLUE, 2.5, **strongest)
    n_all = max(1, round(max(result.n_edges) / max(result.fractions)))
    if result.n_circuit:
        x, y = [100 * result.n_circuit / n_all], [result.of_circuit]
        name = f"the circuit ({result.n_circuit} edges)"
        said = "the circuit: %{x:.3g} % of edges<br>%{y:.3f}"
        look = {"symbol": "diamond"}
        marks.dots(figure, x, y, style.ORANGE, 11, look=look, name=name, said=said)
    axis = {"type": "log", "tickvals": [0.1, 1, 10, 100], "zeroline": False}
    figure.update_xaxes(title={"text": "edges kept (%)"}, **axis)
    figure.update_yaxes(title={"text": "faithfulness"}, zeroline=False)
    heading = f"Faithfulness: CPR {result.cpr:.2f}, CMD {result.cmd:.2f}" if title == "" else title
    subtitle = f"{len(result.values)} pairs; {result.metric}"
    if len(result.random):
        subtitle += f"; random edges: CPR {result.random_cpr:.2f}, CMD {result.random_cmd:.2f}"
    return style.finish(figure, heading, subtitle, plot_height=260, above=62, below=52, left=52)
