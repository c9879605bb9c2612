"""The house style: one template, one set of colours.

Blue is better, red is worse, by the direction that the metric gives; blue is more where it gives
none, and grey is no more than rounding. Both survive the common kinds of colour blindness. Nothing
here changes plotly's defaults: figures carry the template themselves.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from tstlens.metrics import Better

INK = "#1c2733"
MUTED = "#5d6b7a"
FAINT = "#c9d1d9"
GRID = "#e8ecf0"
ROUNDING = "#d3d7dc"
PAPER = "#ffffff"
BLUE = "#2166ac"
BLUE_BAND = "rgba(33,102,172,0.15)"  # an interval around a blue line
RED = "#b2182b"
ORANGE = "#c8651b"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# ColorBrewer's RdBu, low to high.
DIVERGING = [
    [0.0, "#8e1526"],
    [0.125, "#b2182b"],
    [0.25, "#d6604d"],
    [0.375, "#f4a582"],
    [0.46, "#fbe3d6"],
    [0.5, "#f7f7f7"],
    [0.54, "#dcebf4"],
    [0.625, "#92c5de"],
    [0.75, "#4393c3"],
    [0.875, "#2166ac"],
    [1.0, "#10457e"],
]
# The same hues, pale enough to lie behind lines.
WASH = [
    [0.0, "#e59a8d"],
    [0.25, "#f4c4b3"],
    [0.45, "#fbeee8"],
    [0.5, "#ffffff"],
    [0.55, "#eaf3f9"],
    [0.75, "#b5d7ea"],
    [1.0, "#82b5da"],
]
SEQUENTIAL = [[0.0, "#f7fafc"], [0.5, "#7fb2d3"], [1.0, "#10457e"]]
RIGHT = [[0.0, "#eef4f9"], [1.0, "#2166ac"]]
WRONG = [[0.0, "#fdeee2"], [1.0, "#b8480b"]]

# Twelve lines that can be told apart over a pale wash (after Tol's muted scheme).
LINES = [
    "#332288",
    "#117733",
    "#882255",
    "#0f8f8c",
    "#999933",
    "#aa4499",
    "#556070",
    "#b5651d",
    "#44709d",
    "#6b8e23",
    "#cc6677",
    "#222222",
]
BAR_WIDTH = 58  # pixels for a colour bar and its numbers
TITLE_CHARS = 40  # a title of this many characters fits a phone 390 px wide


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": GRID,
        "linecolor": FAINT,
        "zerolinecolor": FAINT,
        "ticks": "",
        "tickfont": {"size": 11, "color": MUTED},
        "title": {"font": {"size": 12, "color": MUTED}, "standoff": 8},
    }
    # Upright: beside a horizontal colour bar plotly 7 misplaces the titles of figure and axes.
    bar = {
        "x": 1,
        "xanchor": "left",
        "y": 1,
        "yanchor": "top",
        "lenmode": "pixels",
        "thickness": 9,
        "xpad": 8,
        "ypad": 0,
        "outlinewidth": 0,
        "ticks": "",
        "nticks": 5,
        "exponentformat": "e",  # plotly would write 0.00002 as "20μ", which looks like a unit
        "tickfont": {"size": 10, "color": MUTED},
    }
    layout = go.Layout(
        font={"family": FONT, "size": 12, "color": INK},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        colorway=LINES,
        title={
            "x": 0.0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 22},
            "font": {"size": 15, "color": INK},
        },
        xaxis=axis,
        yaxis=axis,
        coloraxis={"colorbar": bar},
        hoverlabel={
            "bgcolor": PAPER,
            "bordercolor": FAINT,
            "align": "left",
            "font": {"family": FONT, "size": 12, "color": INK},
        },
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "font": {"size": 11, "color": MUTED},
            "itemwidth": 30,
        },
        hovermode="closest",
        dragmode=False,
        modebar={
            "remove": [
                *("zoom", "pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale"),
                *("resetScale", "sendChartToCloud", "toggleHover"),
            ],
            "bgcolor": "rgba(255,255,255,0)",
            "color": FAINT,
            "activecolor": MUTED,
        },
    )
    return go.layout.Template(layout=layout)


TEMPLATE = _template()


def finish(
    figure: go.Figure,
    title: str | None,
    subtitle: str = "",
    *,
    plot_height: int,
    above: int = 0,
    below: int = 46,
    left: int = 46,
) -> go.Figure:
    """Give a figure the house template, its title and a height in pixels.

    Args:
        figure: what was drawn.
        title: None for none.
        subtitle: a second line in small type.
        plot_height: pixels of the plotting area.
        above: pixels above it for the label of the colours and subplot titles.
        below: pixels below it for the axis.
        left: pixels beside it for the axis.
    """
    top = 14 + above
    if title:
        top += 10  # plotly sets a title's first line partly above its anchor
        lines, small = wrapped(title), wrapped(subtitle, round(TITLE_CHARS * 1.3))
        text = "<br>".join(lines)
        # plotly's own subtitle pushes a title of two lines out of the figure.
        for line in small:
            text += f"<br><span style='font-size:11px;color:{MUTED}'>{line}</span>"
        figure.update_layout(title={"text": text})
        top += 20 * (len(lines) + len(small))
    figure.update_layout(template=TEMPLATE, height=top + plot_height + below)
    layout: Any = figure.layout
    right = BAR_WIDTH if layout.coloraxis.cmin is not None else 14
    margin = {"t": top, "b": below, "l": left, "r": right, "autoexpand": False}
    figure.update_layout(margin=margin)
    return figure


def side(value: float, better: Better | None = None) -> str:
    """The colour of a change: blue where it improves, red where it worsens, grey where it is 0."""
    if value == 0:
        return ROUNDING
    return RED if (value > 0 if better == "lower" else value < 0) else BLUE


def diverging(better: Better | None = None, *, pale: bool = False) -> list[list[Any]]:
    """The zero-centred colours of changes, low to high, on the same sides as :func:`side`."""
    colours = WASH if pale else DIVERGING
    if better != "lower":
        return colours
    return [[1 - at, colour] for at, colour in reversed(colours)]


def sides(name: str = "", better: Better | None = None) -> str:
    """The two colours in words: "blue raises the logit, red lowers it"."""
    verbs = ("lowers", "raises") if better == "lower" else ("raises", "lowers")
    what, it = (f" the {name}", " it") if name else ("", "")
    return f"blue {verbs[0]}{what}, red {verbs[1]}{it}"


def wrapped(text: str, width: int = TITLE_CHARS) -> list[str]:
    """Text broken into lines that fit a phone."""
    return textwrap.wrap(text, width)


def shortened(text: str, width: int = 18) -> str:
    """Text of at most ``width`` characters, the rest an ellipsis."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def label_above(figure: go.Figure, label: str, shift: int = 6) -> int:
    """Write what is measured above the plot, at its left edge; returns the pixels that it takes."""
    lines = wrapped(label, 48)
    figure.add_annotation(
        text="<br>".join(lines),
        showarrow=False,
        align="left",
        font={"size": 11, "color": MUTED},
        **{"xref": "paper", "yref": "paper", "x": 0, "y": 1},
        **{"xanchor": "left", "yanchor": "bottom", "yshift": shift, "borderpad": 0},
    )
    return 14 * len(lines) + shift


def room_for(labels: Iterable[str], title: str = "") -> int:
    """Pixels that tick labels and their axis' title take beside a figure."""
    longest = max((len(label) for label in labels), default=0)
    return 14 + round(6.6 * longest) + (22 if title else 0)


def symmetric_limit(largest: float) -> float:
    """The end of a zero-centred colour scale; 1 where there is nothing but zeros."""
    return largest if largest > 0 else 1.0
