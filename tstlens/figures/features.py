"""Latents as figures: one latent on the series, all at a glance, interventions, matches."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.words import number, when
from tstlens.saes.reading.latent_effect import LatentEffect
from tstlens.saes.reading.matching import DictionaryMatch
from tstlens.saes.reading.result import Features
from tstlens.saes.reading.windows import Window, Windows

MARK = "#f9dcc0"  # behind the samples of a window
MOST_LINES = 9  # classes or steps drawn of a dose response


@draw.register
def draw_features(
    result: Features, *, latent: int | None = None, n: int = 6, title: str | None = None
) -> go.Figure:
    """One latent's strongest windows on the raw series, or all latents at a glance.

    Args:
        result: what :func:`tstlens.saes.features` returned.
        latent: which one; None draws every latent as a point, by how often it is active and how
            much its removal changes the output.
        n: windows.
        title: above the figure.

    Returns:
        A plotly figure.
    """
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
    figure = go.Figure(
        go.Scatter(
            x=table["density"],
            y=table[against],
            mode="markers",
            marker=marker,
            hovertemplate="%{text}<extra></extra>",
            text=hover,
        )
    )
    figure.update_xaxes(
        title="share of positions where active", type="log", tickformat="~%", dtick=1
    )
    figure.update_yaxes(title=label[against], rangemode="tozero")
    above = 0
    if coloured:
        figure.update_layout(
            coloraxis={
                "cmin": 0,
                "cmax": 1,
                "colorscale": style.SEQUENTIAL,
                "colorbar": {"len": 180},
            }
        )
        above = style.label_above(figure, "colour: distance of the best class' AUC from chance")
    heading = f"{len(table)} active latents of {result.hook}" if title is None else title
    return style.finish(figure, heading, plot_height=320, above=above, left=62)


@draw.register
def draw_windows(result: Windows, *, title: str | None = None, subtitle: str = "") -> go.Figure:
    """The windows where a latent is strongest, shaded on their series, activation below.

    Args:
        result: what ``features.top_windows`` returned.
        title: above the figure.
        subtitle: below the title.

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
        line = go.Scatter(
            y=window.values[channel],
            mode="lines",
            line={"width": 1.1, "color": style.LINES[channel % len(style.LINES)]},
            hovertemplate=f"channel {channel}, sample %{{x}}: %{{y:.3g}}<extra></extra>",
        )
        figure.add_trace(line, row=row, col=1)
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
        result: what ``ablate_latent`` or ``steer_latent`` returned.
        measure: "probability", "logit" or "forecast"; see :meth:`LatentEffect.change`.
        title: above the figure.
    """
    frame: Any = result.to_dataframe(measure)
    axis = frame.columns[1]
    size = frame.assign(size=frame["change"].abs()).groupby(axis, sort=False)["size"].max()
    shown = [name for name in size.index if name in set(size.nlargest(MOST_LINES).index)]
    figure = go.Figure()
    ends = frame.groupby("dose")[["control_low", "control_high"]]
    low, high = ends.min()["control_low"], ends.max()["control_high"]
    if len(result.control_latents):
        band = [*high, *low[::-1]]
        figure.add_trace(
            go.Scatter(
                x=[*high.index, *low.index[::-1]],
                y=band,
                fill="toself",
                fillcolor=style.GRID,
                mode="lines",
                line={"width": 0},
                hoverinfo="skip",
                name=f"{len(result.control_latents)} random latents",
            )
        )
    for index, name in enumerate(shown):
        part = frame[frame[axis] == name]
        figure.add_trace(
            go.Scatter(
                x=part["dose"],
                y=part["change"],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": part["high"] - part["change"],
                    "arrayminus": part["change"] - part["low"],
                    "thickness": 1,
                    "width": 2,
                },
                mode="lines+markers",
                name=f"{axis} {style.shortened(str(name), 14)}",
                line={"color": style.LINES[index % len(style.LINES)], "width": 1.6},
                hovertemplate=f"{axis} {name}, dose %{{x:g}}: %{{y:+.3g}}<extra></extra>",
            )
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
    """Similarity of the matched latents, largest first, beside the control's.

    Args:
        result: what ``compare`` returned.
        title: above the figure.
    """
    rank = np.arange(1, len(result.similarity) + 1)
    figure = go.Figure()
    names = [f"{a} and {b}" for a, b in zip(result.latent_a, result.latent_b, strict=True)]
    for values, name, colour, text in (
        (result.similarity, "matched latents", style.BLUE, names),
        (result.chance, result.control, style.MUTED, None),
    ):
        figure.add_trace(
            go.Scatter(
                x=rank,
                y=values,
                mode="lines",
                line={"color": colour, "width": 2},
                name=name,
                text=text,
                hovertemplate=("latents %{text}: " if text else "") + "%{y:.3f}<extra></extra>",
            )
        )
    kind = "cosine of directions" if result.by == "decoder" else "correlation of activations"
    figure.update_xaxes(title="pair, most similar first")
    figure.update_yaxes(title=kind)
    heading = f"{len(rank)} matched latents" if title is None else title
    subtitle = f"mean {result.similarity.mean():.2f}, {result.share():.0%} above 0.7"
    return style.finish(figure, heading, subtitle, plot_height=280, above=30, left=56)
