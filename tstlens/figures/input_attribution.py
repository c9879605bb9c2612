"""Attributions as a heat strip behind the raw series, and their agreement with patching.

Deletion and insertion curves, and how well a surrogate follows the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import Positive, checked
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Scale
from tstlens.figures.words import number, quantity, when
from tstlens.probing.deletion import DeletionInsertion
from tstlens.probing.explanations import AttributionAgreement
from tstlens.probing.input_attribution import InputAttribution
from tstlens.probing.surrogates import Surrogate

MOST_CHANNELS = 12


@draw.register
@checked
def draw_input_attribution(
    result: InputAttribution,
    *,
    index: int = 0,
    channels: Sequence[int] | None = None,
    channel_names: Sequence[str] | None = None,
    limits: Positive | None = None,
    title: str | None = "",
) -> go.Figure:
    """One series, a row per channel: its line over the attribution of every unit.

    Blue raises the measure against the baseline, red lowers it. The dotted line is the baseline.

    Args:
        result: of :func:`tstlens.probing.attribute`.
        index: which series.
        channels: rows; None for the 12 with the largest attributions.
        channel_names: one per channel; numbers where None.
        limits: end of the zero-centred colours; the largest attribution of the series where None.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: no such series or channel.
    """
    one = result.one(index)
    values = one.per_sample()[0].double().numpy()  # [channel, time]
    n_channels, n_time = values.shape
    names = [str(name) for name in channel_names or range(n_channels)]
    if len(names) != n_channels:
        raise ArgumentError(f"expected {n_channels} channel names, got {len(names)}")
    shown = _channels(one.values[0].double().numpy(), channels)
    seen = np.ones(n_time, bool) if one.mask is None else one.mask[0].numpy()
    lines = np.where(seen, one.series[0].double().numpy(), np.nan)
    single = len(one.baseline) == 1 and one.made.get("baseline") != "samples"
    base = np.where(seen, one.baseline[0].double().numpy(), np.nan) if single else None
    found = np.abs(values[shown])
    largest = float(np.nanmax(found)) if np.isfinite(found).any() else 0.0
    end = limits or style.symmetric_limit(largest)
    label = f"attribution of {one.measure.removesuffix(' of the target class')}"
    scale = Scale(f"{label} ({one.measure_unit})", -end, end)
    height_each = 170 if len(shown) == 1 else 60 if len(shown) <= 4 else 38
    gap = 4
    height = height_each * len(shown) + gap * (len(shown) - 1)
    figure = make_subplots(
        rows=len(shown),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=gap / height if len(shown) > 1 else 0,
    )
    owner = [when(cell) for cell in one.cells]
    of_sample = np.full(n_time, "", dtype=object)
    for cell, text in zip(one.cells, owner, strict=True):
        of_sample[cell[0] : cell[1]] = text
    for row, channel in enumerate(shown, start=1):
        drawn = [lines[channel]] if base is None else [lines[channel], base[channel]]
        low, high = float(np.nanmin(drawn)), float(np.nanmax(drawn))
        room = 0.08 * ((high - low) or 1.0)
        ends = [low - room, high + room]
        hover = [
            f"<b>channel {names[channel]}</b>, {text}<br>{number(float(value), signed=True)}"
            for text, value in zip(of_sample, values[channel], strict=True)
        ]
        shading: dict[str, Any] = {"coloraxis": "coloraxis", "hoverongaps": False}
        figure.add_heatmap(
            z=values[channel][None],
            x=np.arange(n_time + 1) - 0.5,
            y=ends,
            hovertext=[hover],
            hovertemplate="%{hovertext}<extra></extra>",
            row=row,
            col=1,
            **shading,
        )
        if base is not None:
            figure.add_scatter(
                x=np.arange(n_time),
                y=base[channel],
                mode="lines",
                line={"color": style.MUTED, "width": 1, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
                row=row,
                col=1,
            )
        figure.add_scatter(
            x=np.arange(n_time),
            y=lines[channel],
            mode="lines",
            line={"color": style.INK, "width": 1.6},
            hoverinfo="skip",
            showlegend=False,
            row=row,
            col=1,
        )
        ticks: dict[str, Any] = {
            "tickmode": "array",
            "tickvals": [sum(ends) / 2],
            "ticktext": [names[channel]],
        }
        if len(shown) == 1 and n_channels == 1:
            ticks = {"nticks": 5}
        figure.update_yaxes(range=ends, showgrid=False, zeroline=False, row=row, col=1, **ticks)
    figure.update_xaxes(range=[-0.5, n_time - 0.5], showgrid=False, zeroline=False)
    figure.update_xaxes(title={"text": "time (sample)"}, row=len(shown), col=1)
    figure.update_layout(coloraxis=scale.coloraxis(height, pale=True))
    if n_channels > 1:
        middle = (len(shown) + 1) // 2
        figure.update_yaxes(title={"text": "channel"}, row=middle, col=1)
    above = style.label_above(figure, f"shading: {scale.label}")
    heading = f"{_method(one.method)}, series {index}" if title == "" else title
    target = "" if one.target is None else f"class index {int(one.target[0])}; "
    subtitle = (
        f"{target}against {one.baseline_name} (dotted)"
        if base is not None
        else f"{target}against {one.baseline_name}"
    )
    subtitle += f"; {number(float(one.baseline_output[0]))} → {number(float(one.output[0]))}"
    if len(shown) < n_channels:
        subtitle += f"; {len(shown)} of {n_channels} channels"
    left = style.room_for([names[channel] for channel in shown], "channel")
    return style.finish(figure, heading, subtitle, plot_height=height, above=above, left=left)


@draw.register
@checked
def draw_attribution_agreement(
    result: AttributionAgreement, *, title: str | None = ""
) -> go.Figure:
    """How many series have which rank correlation; the line is the mean, its band the interval.

    Args:
        result: of :meth:`tstlens.probing.InputAttribution.agreement`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    known = result.spearman[np.isfinite(result.spearman)]
    edges = np.linspace(-1, 1, 21)
    counts = np.histogram(known, edges)[0]
    middle = (edges[1:] + edges[:-1]) / 2
    figure = go.Figure()
    figure.add_bar(
        x=middle,
        y=counts,
        width=0.092,
        marker={"color": [style.RED if x < 0 else style.BLUE for x in middle], "opacity": 0.75},
        hovertemplate="Spearman near %{x:.2f}<br>%{y} series<extra></extra>",
        showlegend=False,
    )
    if np.isfinite(result.low):
        figure.add_vrect(
            x0=result.low, x1=result.high, fillcolor=style.INK, opacity=0.12, line_width=0
        )
    if np.isfinite(result.mean):
        figure.add_vline(x=result.mean, line={"color": style.INK, "width": 2})
    figure.update_xaxes(
        title={"text": "Spearman's correlation, one per series"}, range=[-1.02, 1.02], zeroline=True
    )
    figure.update_yaxes(zeroline=False, nticks=5)
    above = style.label_above(figure, "series")
    heading = f"{_method(result.method)} and patching" if title == "" else title
    interval = f" [{number(result.low)}, {number(result.high)}]" if result.low == result.low else ""
    subtitle = (
        f"over {' × '.join(result.axes)}; mean {number(result.mean)}{interval}; {len(known)} series"
    )
    return style.finish(figure, heading, subtitle, plot_height=200, above=above, below=50)


def _channels(values: np.ndarray, channels: Sequence[int] | None) -> list[int]:
    if channels is None:
        size = np.nansum(np.abs(values), 1)
        return sorted(int(c) for c in np.argsort(-size, kind="stable")[:MOST_CHANNELS])
    wrong = [c for c in channels if not 0 <= c < len(values)]
    if wrong or not channels:
        raise ArgumentError(f"expected channels in 0..{len(values) - 1}, got {list(channels)}")
    return list(channels)


def _method(name: str) -> str:
    words = {"gradient_shap": "GradientSHAP", "kernel_shap": "KernelSHAP"}
    words["permutation_shap"] = "Permutation SHAP"
    return words.get(name, name.replace("_", " ").capitalize())


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
