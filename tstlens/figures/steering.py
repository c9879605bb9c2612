"""Directions, what pushing along them does, and where two sets can be told apart."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, bars, heat_maps
from tstlens.figures.words import number, quantity, site_title, when
from tstlens.probing.directions import Direction
from tstlens.probing.separability_map import Separability
from tstlens.probing.steering_dose import DoseResponse

MOST_RANDOM_LINES = 40


@draw.register
@checked
def draw_dose_response(result: DoseResponse, *, title: str | None = "") -> go.Figure:
    """The mean measure against the strength, with its interval, beside random directions.

    The band is the interval of the mean *change* against no push, over series; each grey line is
    one random direction of equal norm.

    Args:
        result: of :func:`tstlens.probing.dose_response`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    x = list(result.strengths)
    none = result.mean[x.index(0.0)]
    figure = go.Figure()
    lines = result.random.mean(1)
    for one in lines[:MOST_RANDOM_LINES]:
        figure.add_scatter(
            x=x,
            y=one,
            mode="lines",
            line={"color": style.FAINT, "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.add_scatter(
        x=x,
        y=lines.mean(0),
        mode="lines",
        name=f"random directions ({len(lines)}, same norm)",
        line={"color": style.MUTED, "width": 2},
        hovertemplate="strength %{x:g}, random<br>%{y:.3g}<extra></extra>",
    )
    known = np.isfinite(result.low)
    if known.any():
        doses = np.array(x)[known]
        figure.add_scatter(
            x=[*doses, *doses[::-1]],
            y=[*(none + result.high)[known], *(none + result.low)[known][::-1]],
            fill="toself",
            fillcolor="rgba(33,102,172,0.15)",
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
        )
    hover = [
        f"<b>strength {dose:g}</b><br>{number(float(value))}<br>"
        f"change {number(float(change), signed=True)}, p {number(float(p))}"
        for dose, value, change, p in zip(x, result.mean, result.change, result.p, strict=True)
    ]
    figure.add_scatter(
        x=x,
        y=result.mean,
        mode="lines+markers",
        name=f"the direction ({result.method})",
        line={"color": style.BLUE, "width": 2.5},
        marker={"size": 6},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
    figure.update_xaxes(title={"text": f"strength ({result.unit})"}, zeroline=False)
    figure.update_yaxes(zeroline=False, nticks=6)
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"})
    heading = f"Steering {_place(result.hook)}" if title == "" else title
    subtitle = f"{len(result.values)} series; {100 * result.level:g} % interval over series"
    label = quantity(result.measure, result.measure_unit, "value")
    above = style.label_above(figure, label, 30)
    return style.finish(figure, heading, subtitle, plot_height=260, above=above, below=52, left=52)


@draw.register
@checked
def draw_separability(result: Separability, *, title: str | None = "") -> go.Figure:
    """Held-out AUC by layer and position, light at chance; numbers and p on hover.

    Args:
        result: of :func:`tstlens.probing.separability`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    n_pos = result.auc.shape[1]
    columns = Ticks.of("pos", range(n_pos), result.time_cells)
    rows = Ticks("", tuple(_short(name) for name in result.hooks))
    p, high = result.p, np.quantile(result.null, 0.95, axis=0)
    hover = np.empty(result.auc.shape, dtype=object)
    for row, pos in np.ndindex(*hover.shape):
        place = f"position {pos}"
        if result.time_cells is not None and result.time_cells[pos][1] > result.time_cells[pos][0]:
            place = when(result.time_cells[pos])
        hover[row, pos] = (
            f"<b>{result.hooks[row]}</b><br>{place}<br>AUC {number(float(result.auc[row, pos]))}, "
            f"null below {number(float(high[row, pos]))}<br>p {number(float(p[row, pos]))}, "
            f"{result.n_series[row, pos]} series"
        )
    heading = "Where the two sets can be told apart" if title == "" else title
    made = result.made
    subtitle = (
        f"{made.get('n_a')} and {made.get('n_b')} series, {made.get('n_splits')} folds; null mean "
        f"{number(float(np.nanmean(result.null)))}"
    )
    scale = Scale("held-out AUC (0.5 is chance)", 0.5, 1.0, diverging=False)
    panel = Panel("", result.auc, hover)
    return heat_maps([panel], rows, columns, scale, title=heading, subtitle=subtitle)


@draw.register
@checked
def draw_direction(result: Direction, *, most: int = 40, title: str | None = "") -> go.Figure:
    """The largest entries of a direction, largest first.

    Args:
        result: of :func:`tstlens.probing.direction`.
        most: how many entries.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: fewer than 1 entry asked for.
    """
    if most < 1:
        raise ArgumentError(f"expected most of at least 1, got {most}")
    frame = result.to_dataframe()
    frame = frame.sort_values("value", key=abs, ascending=False, kind="stable")[:most]
    labels = [
        f"H{row.head}:{row.feature}" if "head" in frame else str(row.feature)
        for row in frame.itertuples()
    ]
    values = np.asarray(frame["value"], dtype=float)
    end = style.symmetric_limit(float(np.abs(values).max())) * 1.05
    hover = [
        f"dimension {label}<br>{number(float(value), signed=True)}"
        for label, value in zip(labels, values, strict=True)
    ]
    heading = f"Direction in {_place(result.hook)}" if title == "" else title
    subtitle = f"{result.method}, norm {number(result.norm)}: {result.unit}"
    ticks = Ticks("dimension, largest first", tuple(labels))
    scale = Scale("entry of the vector", -end, end)
    return bars(ticks, values, hover, scale, title=heading, subtitle=subtitle)


def _short(hook: str) -> str:
    """``blocks.1.hook_resid_post`` as "L1 resid_post"."""
    leaf = hook.rsplit("hook_", 1)[-1]
    parts = hook.split(".")
    return f"L{parts[1]} {leaf}" if parts[0] == "blocks" else leaf


def _place(hook: str) -> str:
    leaf = hook.rsplit("hook_", 1)[-1]
    parts = hook.split(".")
    layer = f", layer {parts[1]}" if parts[0] == "blocks" else ""
    return f"{site_title(leaf)}{layer}"
