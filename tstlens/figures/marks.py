"""What drawings are made of beside maps and bars: curves, bands, dots, intervals, shaded time.

A mark without a name stays out of the legend, one without a text says nothing on hover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.words import number, when

Said = str | Sequence[str] | np.ndarray | None


def hovered(said: Said) -> dict[str, Any]:
    """What hovering says: nothing, one template for all points, or a text for each."""
    if said is None:
        return {"hoverinfo": "skip"}
    if isinstance(said, str):
        return {"hovertemplate": f"{said}<extra></extra>"}
    return {"hovertext": list(said), "hovertemplate": "%{hovertext}<extra></extra>"}


def _named(name: str | None) -> dict[str, Any]:
    return {"showlegend": False} if name is None else {"name": name}


def curve(
    figure: go.Figure,
    x: Any,
    y: Any,
    color: str,
    width: float | int = 2,
    *,
    name: str | None = None,
    said: Said = None,
    dash: str | None = None,
    dots: int | None = None,
    **more: Any,
) -> None:
    """A line, with a dot of ``dots`` pixels at every point."""
    line = {"color": color, "width": width} | ({"dash": dash} if dash else {})
    marker = {"marker": {"size": dots}} if dots else {}
    mode = "lines+markers" if dots else "lines"
    options = {**_named(name), **hovered(said), **marker, **more}
    figure.add_scatter(x=x, y=y, mode=mode, line=line, **options)


def band(figure: go.Figure, x: Any, low: Any, high: Any, color: str, **more: Any) -> None:
    """The area between two curves, where both are known."""
    known = np.isfinite(low)
    if not known.any():
        return
    x, low, high = (np.asarray(part)[known] for part in (x, low, high))
    options = {"mode": "lines", "line": {"width": 0}, **_named(None), **hovered(None), **more}
    figure.add_scatter(
        x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=color, **options
    )


def dots(
    figure: go.Figure,
    x: Any,
    y: Any,
    color: Any,
    size: float | int = 7,
    *,
    look: dict[str, Any] | None = None,
    name: str | None = None,
    said: Said = None,
    **more: Any,
) -> None:
    """Markers; ``look`` is more of plotly's marker (symbol, opacity, line)."""
    marker = {"size": size, "color": color, **(look or {})}
    options = {"mode": "markers", **_named(name), **hovered(said), **more}
    figure.add_scatter(x=x, y=y, marker=marker, **options)


def whiskers(
    mean: Any,
    low: Any,
    high: Any,
    color: str = style.INK,
    thickness: float | int = 2,
    width: float | int = 0,
) -> dict[str, Any]:
    """Plotly's ``error_x`` or ``error_y`` from the ends of intervals, [entry] each."""
    ends = {"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low}
    return {**ends, "color": color, "thickness": thickness, "width": width}


def spread(n: int, wide: float = 0.5) -> np.ndarray:
    """Offsets that put n dots beside each other, not on one line."""
    return (np.arange(n) % 7 - 3) / 7 * wide


def padded(low: float, high: float, share: float) -> list[float]:
    """Ends of an axis with some room; a constant gets room too."""
    room = share * ((high - low) or 1.0)
    return [low - room, high + room]


def diagonal(figure: go.Figure, low: Any, high: Any, **place: Any) -> np.ndarray:
    """The line y = x behind two axes of one quantity, and the ends of both."""
    ends = np.array([low, high], dtype=float)
    ends += np.array([-0.04, 0.04]) * max(float(np.ptp(ends)), 1e-12)
    curve(figure, ends, ends, style.FAINT, 1.5, **place)
    return ends


def strand(start: tuple[float, float], stop: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a line that leaves and reaches its nodes upright."""
    t = np.linspace(0, 1, 25)
    bend = t * t * (3 - 2 * t)
    return start[0] + (stop[0] - start[0]) * bend, start[1] + (stop[1] - start[1]) * t


def named_rows(figure: go.Figure, labels: Sequence[str], **more: Any) -> None:
    """A vertical axis with a label at 0, 1, 2 …"""
    at = {"tickmode": "array", "tickvals": np.arange(len(labels)), "ticktext": labels}
    figure.update_yaxes(**at, showgrid=False, zeroline=False, **more)


def each_cell(shape: Sequence[int], text: Callable[..., str]) -> np.ndarray:
    """What hovering over every cell of a grid says."""
    texts = np.empty(tuple(shape), dtype=object)
    for at in np.ndindex(*texts.shape):
        texts[at] = text(*at)
    return texts


def row_of(index: int, n: int, what: str) -> int:
    """An index that may count from the end, from the start; of a row that there is."""
    if not -n <= index < n:
        raise ArgumentError(f"expected {what} in 0..{n - 1}, got {index}")
    return index % n


def headings_left(figure: go.Figure, size: int = 12, **more: Any) -> None:
    """Headings of panels at the left edge of their panel."""
    layout: Any = figure.layout
    for at, note in enumerate(layout.annotations):
        left = layout[f"xaxis{at + 1 if at else ''}"].domain[0]
        note.update(x=left, xanchor="left", font={"size": size, "color": style.INK}, **more)


def measured(
    figure: go.Figure,
    names: list[str],
    values: list[Any],
    measure: str,
    colors: list[str],
    explained: bool,
    row: int,
    **more: Any,
) -> list[Any]:
    """One measure of several dictionaries as bars in a panel of their own; returns their ends.

    A share of the variance ``explained`` far below 0 (worse than the mean) ends at -0.1: it would
    flatten the others.
    """
    drawn = [max(value, -0.1) for value in values] if explained else values
    figure.add_bar(
        y=names,
        x=drawn,
        orientation="h",
        marker={"color": colors},
        text=[number(value) for value in values],
        textposition="auto",
        insidetextanchor="start",
        textfont={"size": 10},
        customdata=values,
        showlegend=False,
        row=row,
        col=1,
        **hovered(f"%{{y}}: {measure} %{{customdata:.4g}}"),
        **more,
    )
    figure.update_yaxes(autorange="reversed", row=row, col=1)
    return drawn


def legend_below(figure: go.Figure, pixels: int | None = None, height: int = 0) -> go.Figure:
    """The legend so many pixels below a plot of this height; at the figure's end where None."""
    if pixels is not None:
        legend = {"y": -pixels / height, "yanchor": "top", "yref": "paper"}
        return figure.update_layout(legend=legend)
    legend = {"y": 0, "yref": "container", "yanchor": "bottom", "x": 0, "orientation": "h"}
    return figure.update_layout(legend={**legend, "font": {"size": 11, "color": style.MUTED}})


def menu(figure: go.Figure, groups: Mapping[str, Sequence[int]]) -> go.Figure:
    """A dropdown at the top right that shows one group of traces at a time, first the first.

    Args:
        figure: of which every trace is in one of the groups.
        groups: name -> indices of its traces.
    """
    traces: Any = figure.data
    shown = [[at in own for at in range(len(traces))] for own in groups.values()]
    for trace, visible in zip(traces, shown[0], strict=True):
        trace.visible = visible
    buttons = [
        {"label": name, "method": "restyle", "args": [{"visible": visible}]}
        for name, visible in zip(groups, shown, strict=True)
    ]
    font = {"size": 11, "color": style.INK}
    look = {"bgcolor": style.PAPER, "bordercolor": style.FAINT, "font": font, "showactive": True}
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 4, "t": 0}}
    return figure.update_layout(updatemenus=[{"buttons": buttons, **look, **place}])


def title_at_edge(figure: go.Figure) -> go.Figure:
    """The title at the figure's left edge: above long row labels a phone would cut it off."""
    return figure.update_layout(title={"xref": "container", "x": 0, "pad": {"l": 12, "t": 22}})


def shaded(
    values: Float[np.ndarray, " cell"],
    cells: Sequence[tuple[int, int]],
    n_time: int,
    ends: list[float],
    said: Callable[[float], str],
    signed: bool = True,
) -> go.Heatmap:
    """A value per position behind a series, a column per sample.

    Cells may leave gaps or overlap; where they do the larger one shows (the stronger of changes).
    """
    column = np.full(n_time, np.nan)
    text = np.full(n_time, "", dtype=object)
    size = np.abs(values) if signed else values
    strongest = np.full(n_time, np.nan)
    for value, strength, cell in zip(values, size, cells, strict=True):
        for sample in range(cell[0], min(cell[1], n_time)):
            if not strength <= strongest[sample] and (signed or np.isfinite(value)):
                column[sample], strongest[sample] = value, strength
                text[sample] = f"{when(cell)}<br>{said(value)}"
    return strip(column, text, ends)


def strip(column: Float[np.ndarray, " time"], text: np.ndarray, ends: list[float]) -> go.Heatmap:
    """One value per sample as a strip of colour over the height of a panel."""
    return go.Heatmap(
        z=column[None],
        x=np.arange(len(column) + 1) - 0.5,
        y=ends,
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertext=[list(text)],
        hovertemplate="%{hovertext}<extra></extra>",
    )
