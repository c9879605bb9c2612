"""Grids of numbers as heat maps or bars: the drawing that every sweep shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from tstlens.figures import marks, style
from tstlens.figures.words import Cells, axis_title, entry_label, in_cell
from tstlens.metrics import Better

MOST_IN_CELLS = (12, 9)  # rows and columns up to which cells print their numbers
MOST_DOTS = 400  # more single pairs than this are a cloud
WIDE = 13  # maps with more columns than this get a row of their own


@dataclass(frozen=True)
class Scale:
    """A colour scale and what it shows.

    Args:
        label: the colour bar's title, with the unit.
        low: value of the first colour.
        high: value of the last colour.
        diverging: zero-centred; otherwise light to dark.
        better: which direction is an improvement, and so which end is blue.
    """

    label: str
    low: float
    high: float
    diverging: bool = True
    better: Better | None = None

    @property
    def digits(self) -> int:
        """Decimals of a number printed in a cell."""
        largest = max(abs(self.low), abs(self.high))
        return 0 if largest >= 20 else 1 if largest >= 2 else 2 if largest >= 0.1 else 3

    @property
    def form(self) -> str:
        """The format of a number in a cell; powers of ten where three decimals would be zeros."""
        small = max(abs(self.low), abs(self.high)) < 0.005
        return ".0e" if small else f".{self.digits}f"

    def coloraxis(self, height: int, *, pale: bool = False) -> dict[str, Any]:
        """The plotly coloraxis of a figure whose plot is ``height`` pixels high."""
        scale = style.diverging(self.better, pale=pale) if self.diverging else style.SEQUENTIAL
        return {
            "cmin": self.low,
            "cmax": self.high,
            "colorscale": scale,
            "colorbar": {"len": min(height, 240)},
        }


@dataclass(frozen=True)
class Ticks:
    """One axis of a grid, ready to be drawn.

    Args:
        title: the axis in words.
        labels: one per entry.
        edges: [entry + 1] in samples, where the entries lie side by side in time; else None.
    """

    title: str
    labels: tuple[str, ...]
    edges: Float[np.ndarray, " edge"] | None = None

    @classmethod
    def of(cls, axis: str, entries: Sequence[Any], cells: Cells = None) -> Ticks:
        """The ticks of an axis of a result."""
        if axis not in ("pos", "query", "key"):
            cells = None
        labels = tuple(entry_label(axis, entry, cells) for entry in entries)
        if axis == "part":  # "attention L0" over two lines, which a phone has room for
            labels = tuple(label.replace(" ", "<br>") for label in labels)
        return cls(axis_title(axis, cells), labels, _edges(axis, entries, cells))

    @property
    def at(self) -> Any:
        """Where plotly puts the entries: edges in samples, or the labels as categories."""
        if self.edges is not None:
            return self.edges
        if any(label.lstrip("-").isdecimal() for label in self.labels):
            return list(range(len(self.labels)))  # plotly takes a label "3" for the tick at 3
        return list(self.labels)

    def layout(self) -> dict[str, Any]:
        """The plotly axis."""
        if self.edges is not None:
            return {"title": {"text": self.title}, "showgrid": False, "zeroline": False}
        step = -(-len(self.labels) // 32)  # every label where there is room, else every few
        return {
            "title": {"text": self.title},
            "type": "category",
            "showgrid": False,
            "tickmode": "array",
            "tickvals": list(range(0, len(self.labels), step)),
            "ticktext": [style.shortened(label) for label in self.labels[::step]],
        }


def _edges(axis: str, entries: Sequence[Any], cells: Cells) -> np.ndarray | None:
    if axis == "time":
        cells, at = [(int(entry), int(entry) + 1) for entry in entries], range(len(entries))
    elif cells is not None:
        at = entries
    else:
        return None
    spans = [cells[entry] for entry in at]
    apart = any(before[1] != after[0] for before, after in pairwise(spans))
    if not spans or apart or any(start >= stop for start, stop in spans):
        return None
    # A sample is a point: its cell reaches half a sample to either side.
    return np.array([start for start, _ in spans] + [spans[-1][1]], dtype=float) - 0.5


@dataclass(frozen=True)
class Panel:
    """One heat map of a figure.

    Args:
        name: above it; "" for none.
        values: [row, column].
        hover: [row, column] of strings.
        grey: bool [row, column], what is no more than rounding; None where nothing is.
    """

    name: str
    values: Float[np.ndarray, "row column"]
    hover: np.ndarray
    grey: np.ndarray | None = None


def ends_of_axis(
    points: Float[np.ndarray, ...], *ends: Float[np.ndarray, ...]
) -> tuple[float, float]:
    """Range of an axis from 0 to the points, with at most their own span more for interval ends.

    A single wide interval would else squeeze all that was measured into a line; it leaves the axis.
    """
    known = np.append(points[np.isfinite(points)], 0.0)
    low, high = known.min(), known.max()
    span = high - low or 1.0
    reach = np.concatenate([known, *(end[np.isfinite(end)] for end in ends)])
    low, high = max(reach.min(), low - span), min(reach.max(), high + span)
    return float(low - 0.05 * (high - low)), float(high + 0.05 * (high - low))


def heat_maps(
    panels: Sequence[Panel],
    rows: Ticks,
    columns: Ticks,
    scale: Scale,
    *,
    title: str | None = None,
    subtitle: str = "",
    across: int | None = None,
    menu: bool = False,
) -> go.Figure:
    """Heat maps of one shape with one colour scale, first row on top.

    Args:
        panels: what is drawn, in reading order.
        rows: the vertical axis.
        columns: the horizontal axis.
        scale: colours for all of them.
        title: of the figure.
        subtitle: a second line.
        across: panels beside each other; 1 where maps are wide, else up to 2.
        menu: one panel at a time, chosen from a dropdown.
    """
    menu = menu and len(panels) > 1
    n_rows, n_columns = len(rows.labels), len(columns.labels)
    across = across or (1 if n_columns >= WIDE else 2)
    across = 1 if menu else min(across, len(panels))
    down = 1 if menu else -(-len(panels) // across)
    row_height = 40 if n_rows <= 4 else 30 if n_rows <= 12 else 14 if n_rows <= 40 else 7
    named = any(panel.name for panel in panels) and not menu
    gap, panel_height = (34 if named else 16), row_height * n_rows
    height = down * panel_height + (down - 1) * gap
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_xaxes=True,
        shared_yaxes=True,
        vertical_spacing=gap / height if down > 1 else 0,
        horizontal_spacing=0.04 if across > 1 else 0,
        subplot_titles=[panel.name for panel in panels] if named else None,
    )
    # Samples and numbers keep their place when a phone makes the map narrow; text would not.
    printed = n_rows <= MOST_IN_CELLS[0] and n_columns * across <= MOST_IN_CELLS[1]
    covers = []
    groups = {panel.name: [number] for number, panel in enumerate(panels)}
    for number, panel in enumerate(panels):
        row, column = (1, 1) if menu else (number // across + 1, number % across + 1)
        trace = go.Heatmap(
            z=panel.values,
            x=columns.at,
            y=list(range(n_rows)),
            coloraxis="coloraxis",
            hovertext=panel.hover,
            hovertemplate="%{hovertext}<extra></extra>",
            xgap=1 if n_columns <= 60 else 0,
            ygap=1 if row_height > 7 else 0,
            # plotly itself would write a hyphen for a minus in cells, unlike on its axes.
            text=[[in_cell(z, scale.form) for z in row] for row in panel.values.tolist()]
            if printed
            else None,
            texttemplate="%{text}" if printed else None,
            textfont={"size": 10},
        )
        figure.add_trace(trace, row=row, col=column)
        if panel.grey is not None and panel.grey.any():
            text: Any = trace.text
            over = trace.to_plotly_json() | {
                "z": np.where(panel.grey, 0.0, np.nan),
                "text": np.where(panel.grey, text, "") if printed else None,
                "coloraxis": None,
                "colorscale": [[0, style.ROUNDING], [1, style.ROUNDING]],
                "showscale": False,
                "hoverongaps": False,
            }
            groups[panel.name].append(len(panels) + len(covers))
            covers.append((go.Heatmap(over), row, column))
        figure.update_xaxes(
            showticklabels=row == down or number + across >= len(panels), row=row, col=column
        )
    for cover, row, column in covers:
        figure.add_trace(cover, row=row, col=column)
    figure.update_xaxes(columns.layout() | {"title": None})
    figure.update_xaxes(title={"text": columns.title}, row=down)
    step = -(-n_rows // max(1, panel_height // 13))
    names = [style.shortened(label) for label in rows.labels[::step]]
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        zeroline=False,
        tickmode="array",
        tickvals=list(range(0, n_rows, step)),
        ticktext=names,
    )
    figure.update_yaxes(title={"text": rows.title}, col=1)
    figure.update_layout(coloraxis=scale.coloraxis(height))
    marks.headings_left(figure)
    above = style.label_above(figure, scale.label, 24 if named else 6)
    left = style.room_for(names, rows.title)
    if menu:
        marks.menu(figure, groups)
        above = max(above, 36)
    return style.finish(figure, title, subtitle, plot_height=height, above=above, left=left)


def bars(
    ticks: Ticks,
    values: Float[np.ndarray, " entry"],
    hover: Sequence[str],
    scale: Scale,
    *,
    low: Float[np.ndarray, " entry"] | None = None,
    high: Float[np.ndarray, " entry"] | None = None,
    each: Float[np.ndarray, "pair entry"] | None = None,
    grey: np.ndarray | None = None,
    title: str | None = None,
    subtitle: str = "",
) -> go.Figure:
    """One bar per entry, whiskers for the interval, a faint dot per pair.

    Args:
        ticks: the horizontal axis.
        values: heights.
        hover: one text per bar.
        scale: the vertical axis: its label and ends.
        low: lower ends of the intervals; NaN for none.
        high: upper ends.
        each: what every pair did, drawn as dots; None for no dots.
        grey: bool [entry], what is no more than rounding.
        title: of the figure.
        subtitle: a second line.
    """
    figure = go.Figure()
    if ticks.edges is not None:
        x, width = (ticks.edges[1:] + ticks.edges[:-1]) / 2, np.diff(ticks.edges) * 0.86
    else:
        x, width = np.arange(len(values), dtype=float), np.full(len(values), 0.68)
    error: dict[str, Any] = {}
    if low is not None and high is not None and np.isfinite(low).any():
        wide = 4 if len(values) <= 30 else 0
        error["error_y"] = marks.whiskers(values, low, high, thickness=1.4, width=wide)
    grey = np.zeros(len(values), dtype=bool) if grey is None else grey
    colors = [
        style.ROUNDING if faint else style.side(value, scale.better)
        for value, faint in zip(values, grey, strict=True)
    ]
    if not scale.diverging:
        colors = [style.BLUE] * len(values)
    figure.add_bar(
        x=x,
        y=values,
        width=width,
        marker={"color": colors, "opacity": 0.75},
        **marks.hovered(hover),
        showlegend=False,
        **error,
    )
    if each is not None and len(each) > 1 and each.size <= MOST_DOTS:
        beside = marks.spread(len(each))[:, None] * width[None]
        look = {"opacity": 0.45, "line": {"color": style.PAPER, "width": 0.5}}
        marks.dots(figure, (x[None] + beside).ravel(), each.ravel(), style.INK, 5, look=look)
    layout, below = ticks.layout(), {}
    if ticks.edges is None:
        layout |= {"type": "linear", "range": [-0.6, len(values) - 0.4], "zeroline": False}
        shown = layout["ticktext"]
        if len(shown) * max(map(len, shown), default=0) > 90:  # they do not fit side by side
            layout |= {"tickangle": -90, "title": {"text": ""}}
            below["below"] = style.room_for(shown)
    figure.update_xaxes(layout)
    shown = (scale.low, scale.high)
    if each is not None and len(each) > 1:
        shown = ends_of_axis(each, *(end for end in (low, high) if end is not None))
    figure.update_yaxes(zeroline=True, zerolinewidth=1.5, range=shown, nticks=6)
    above = style.label_above(figure, scale.label)
    return style.finish(figure, title, subtitle, plot_height=230, above=above, **below)
