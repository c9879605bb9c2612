"""How good a dictionary is, beside its controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.words import number
from tstlens.saes.planted import Recovery
from tstlens.saes.scores import Scores

_COLOURS = {"trained": style.BLUE, "neurons": style.ORANGE}
_GREYS = ("#5d6b7a", "#a3adb8")  # of the random dictionaries


@draw.register
def draw_scores(scores: Scores, *, title: str | None = "") -> go.Figure:
    """Explained variance, the task with each dictionary spliced in, and how often latents fire.

    Each measure of the task has three lines: the model as it is (solid), with the activation at
    its mean (dashed) and at zero (dotted). Where these are close together the task says little
    about a dictionary.

    Args:
        scores: what :func:`tstlens.saes.score` returned.
        title: "" for one made from the scores, None for none.

    Returns:
        A plotly figure.
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
        # A bar that ends far outside (a dictionary worse than the mean) would flatten the others.
        low = -0.1 if row == 1 else None
        drawn = [max(value, low) if low is not None else value for value in values]
        figure.add_bar(
            y=names,
            x=drawn,
            orientation="h",
            marker={"color": colours},
            text=[number(value) for value in values],
            textposition="auto",
            insidetextanchor="start",
            textfont={"size": 10},
            customdata=values,
            hovertemplate=f"%{{y}}: {heading} %{{customdata:.4g}}<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
        figure.update_yaxes(autorange="reversed", row=row, col=1)
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
            hovertemplate=f"{name}, from %{{x:.2%}}: %{{y}} latents<extra></extra>",
            showlegend=False,
            row=len(headings) + 1,
            col=1,
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


@draw.register
def draw_recovery(result: Recovery, *, title: str | None = "") -> go.Figure:
    """How well planted features were found, from 0 to 1, beside random directions.

    Args:
        result: what :func:`tstlens.saes.recovery` returned.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    rows = [
        ("mean cosine with the features (MCC)", result.mcc),
        ("the same of random directions", result.random_mcc),
        ("latents with a feature of their own", result.uniqueness),
        ("F1 as detectors", result.f1),
    ]
    rows = [(name, value) for name, value in rows if not np.isnan(value)]
    names = [name for name, _ in rows]
    figure = go.Figure(
        go.Bar(
            y=names,
            x=[value for _, value in rows],
            orientation="h",
            marker={"color": [style.MUTED if "random" in n else style.BLUE for n in names]},
            text=[f"{value:.3f}" for _, value in rows],
            textposition="auto",
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(range=[0, 1.02])
    heading = "Planted features found" if title == "" else title
    subtitle = f"{result.n_latents} latents, {result.n_features} planted features"
    left = style.room_for(names) + 4
    return style.finish(figure, heading, subtitle, plot_height=38 * len(rows) + 20, left=left)


def _colours(names: list[str]) -> list[str]:
    greys = iter(_GREYS * len(names))
    return [_COLOURS.get(name) or next(greys) for name in names]
