"""Deletion and insertion curves, and how well a surrogate follows the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import checked
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.words import number, quantity
from tstlens.probing.attribution.deletion_result import DeletionInsertion
from tstlens.probing.attribution.surrogates import Surrogate

MOST_WEIGHTS = 10


@draw.register
@checked
def draw_deletion_insertion(result: DeletionInsertion, *, title: str | None = "") -> go.Figure:
    """Mean curves with their intervals over series, beside random orders.

    Deletion should fall fast, insertion should rise fast; grey lines are random orders.

    Args:
        result: of :func:`tstlens.probing.deletion_insertion`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    percent = [100 * share for share in result.fractions]
    frame = result.to_dataframe().set_index("curve")
    headings = []
    for kind, wish in (("deletion", "low is good"), ("insertion", "high is good")):
        row = frame.loc[kind]
        headings.append(
            f"{kind.capitalize()}: area {number(row['area'])}, random "
            f"{number(row['random_area'])} ({wish})"
        )
    height, gap = 360, 44
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=gap / height, subplot_titles=headings
    )
    for row, kind in enumerate(("deletion", "insertion"), start=1):
        random = getattr(result, f"random_{kind}").mean(1)
        for one in random:
            figure.add_scatter(
                x=percent,
                y=one,
                mode="lines",
                line={"color": style.FAINT, "width": 1},
                hoverinfo="skip",
                showlegend=False,
                row=row,
                col=1,
            )
        figure.add_scatter(
            x=percent,
            y=random.mean(0),
            mode="lines",
            name=f"random orders ({len(random)})",
            line={"color": style.MUTED, "width": 2},
            hovertemplate="%{x:.0f} % at random<br>%{y:.3g}<extra></extra>",
            showlegend=row == 1,
            row=row,
            col=1,
        )
        low, high = result.intervals(kind)
        known = np.isfinite(low)
        if known.any():
            x = np.array(percent)[known]
            figure.add_scatter(
                x=[*x, *x[::-1]],
                y=[*high[known], *low[known][::-1]],
                fill="toself",
                fillcolor="rgba(33,102,172,0.15)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                row=row,
                col=1,
            )
        figure.add_scatter(
            x=percent,
            y=getattr(result, kind).mean(0),
            mode="lines",
            name=result.method.replace("_", " "),
            line={"color": style.BLUE, "width": 2.5},
            hovertemplate=f"%{{x:.0f}} %, {kind}<br>%{{y:.3g}}<extra></extra>",
            showlegend=row == 1,
            row=row,
            col=1,
        )
    # Both panels show one quantity, so they share their ends.
    curves = [
        np.concatenate([getattr(result, kind).mean(0), *getattr(result, f"random_{kind}").mean(1)])
        for kind in ("deletion", "insertion")
    ]
    ends = np.array([np.min(curves), np.max(curves)])
    ends += np.array([-0.06, 0.06]) * max(float(np.ptp(ends)), 1e-12)
    figure.update_yaxes(range=ends, zeroline=False, nticks=6)
    figure.update_xaxes(zeroline=False)
    figure.update_xaxes(title={"text": "units replaced, or put back (%)"}, row=2, col=1)
    notes: list[Any] = list(figure.select_annotations())
    for note in notes:
        note.update(x=0, xanchor="left", font={"size": 12, "color": style.INK})
    figure.update_layout(legend={"y": 1 + 22 / height, "yanchor": "bottom"})
    above = style.label_above(figure, quantity(result.measure, result.measure_unit, "value"), 52)
    heading = "Deletion and insertion" if title == "" else title
    subtitle = f"{len(result.deletion)} series; against {result.baseline_name}"
    return style.finish(
        figure, heading, subtitle, plot_height=height, above=above, below=50, left=50
    )


@draw.register
@checked
def draw_surrogate(result: Surrogate, *, title: str | None = "") -> go.Figure:
    """Held-out predictions against the model's output, and the strongest weights if it may explain.

    Args:
        result: of :func:`tstlens.probing.surrogate`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    explained = result.explanation is not None and len(result.explanation) > 0
    frame = result.to_dataframe()[:MOST_WEIGHTS]
    each, scatter, gap = 34, 240, 76
    height = scatter + (gap + each * len(frame) if explained else 0)
    heights = [scatter, each * len(frame)] if explained else [scatter]
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        row_heights=heights,
        vertical_spacing=gap / height if explained else 0,
    )
    both = np.concatenate([result.output, result.predicted])
    ends = np.array([both.min(), both.max()])
    ends += np.array([-0.04, 0.04]) * max(float(np.ptp(ends)), 1e-12)
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": style.FAINT, "width": 1.5},
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=result.output,
        y=result.predicted,
        mode="markers",
        marker={"size": 5, "color": style.BLUE, "opacity": 0.45},
        hovertemplate="model %{x:.3g}<br>surrogate %{y:.3g}<extra></extra>",
        showlegend=False,
        row=1,
        col=1,
    )
    measure = quantity(result.measure, result.measure_unit, "value")
    figure.update_xaxes(title={"text": f"the model's {measure}"}, range=ends, row=1, col=1)
    figure.update_yaxes(range=ends, nticks=6, row=1, col=1)
    if explained:
        weights = np.asarray(frame["weight"], dtype=float)
        at = np.arange(len(frame), dtype=float)
        figure.add_bar(
            x=weights,
            y=at + 0.18,
            width=0.42,
            orientation="h",
            marker={"color": [style.RED if w < 0 else style.BLUE for w in weights], "opacity": 0.8},
            hovertext=[
                f"{f}<br>{number(w, signed=True)}"
                for f, w in zip(frame["feature"], weights, strict=True)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False,
            row=2,
            col=1,
        )
        for place, name in zip(at, frame["feature"], strict=True):
            figure.add_annotation(
                text=style.shortened(name, 46),
                x=0,
                xref="x2 domain",
                y=place - 0.22,
                yref="y2",
                showarrow=False,
                xanchor="left",
                font={"size": 11, "color": style.INK},
            )
        wide = float(np.abs(weights).max()) * 1.06
        span = [-wide, wide] if weights.min() < 0 else [0, wide]
        per = "share of the explained variance"
        if result.kind == "linear":
            per = f"weight: {measure} per standard deviation"
        figure.update_xaxes(title={"text": per}, range=span, zeroline=True, row=2, col=1)
        figure.update_yaxes(
            range=[len(frame) - 0.4, -0.55], showticklabels=False, showgrid=False, row=2, col=1
        )
    above = style.label_above(figure, "held-out prediction of the surrogate")
    state = "" if explained else " explains nothing"
    heading = f"{result.kind.capitalize()} surrogate{state}" if title == "" else title
    subtitle = (
        f"held-out R² {number(result.fidelity)} [{number(result.low)}, {number(result.high)}], "
        f"shuffled {number(result.shuffled)}, needed {result.threshold:g}"
    )
    return style.finish(
        figure, heading, subtitle, plot_height=height, above=above, below=50, left=50
    )
