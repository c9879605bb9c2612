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
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Scale
from tstlens.figures.words import number, quantity, when
from tstlens.probing.deletion import DeletionInsertion
from tstlens.probing.explanations import AttributionAgreement
from tstlens.probing.input_attribution import InputAttribution
from tstlens.probing.surrogates import Surrogate

MOST_CHANNELS = 12
MOST_WEIGHTS = 10


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
        index: which series.
        channels: rows; None for the 12 with the largest attributions.
        channel_names: one per channel; numbers where None.
        limits: end of the zero-centred colours; the largest attribution of the series where None.

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
    each, gap = (170 if len(shown) == 1 else 60 if len(shown) <= 4 else 38), 4
    height = each * len(shown) + gap * (len(shown) - 1)
    spacing = gap / height if len(shown) > 1 else 0
    figure = make_subplots(rows=len(shown), cols=1, shared_xaxes=True, vertical_spacing=spacing)
    of_sample = np.full(n_time, "", dtype=object)
    for cell in one.cells:
        of_sample[cell[0] : cell[1]] = when(cell)
    time = np.arange(n_time)
    for row, channel in enumerate(shown, start=1):
        drawn = [lines[channel]] if base is None else [lines[channel], base[channel]]
        ends = marks.padded(float(np.nanmin(drawn)), float(np.nanmax(drawn)), 0.08)
        said = [
            f"<b>channel {names[channel]}</b>, {text}<br>{number(float(value), signed=True)}"
            for text, value in zip(of_sample, values[channel], strict=True)
        ]
        place: dict[str, Any] = {"row": row, "col": 1}
        figure.add_trace(marks.strip(values[channel], np.array(said, object), ends), **place)
        if base is not None:
            marks.curve(figure, time, base[channel], style.MUTED, 1, dash="dot", **place)
        marks.curve(figure, time, lines[channel], style.INK, 1.6, **place)
        ticks: dict[str, Any] = {
            "tickmode": "array",
            "tickvals": [sum(ends) / 2],
            "ticktext": [names[channel]],
        }
        if len(shown) == 1 and n_channels == 1:
            ticks = {"nticks": 5}
        figure.update_yaxes(range=ends, showgrid=False, zeroline=False, **place, **ticks)
    figure.update_xaxes(range=[-0.5, n_time - 0.5], showgrid=False, zeroline=False)
    figure.update_xaxes(title={"text": "time (sample)"}, row=len(shown), col=1)
    figure.update_layout(coloraxis=scale.coloraxis(height, pale=True))
    if n_channels > 1:
        middle = (len(shown) + 1) // 2
        figure.update_yaxes(title={"text": "channel"}, row=middle, col=1)
    above = style.label_above(figure, f"shading: {scale.label}")
    heading = f"{_method(one.method)}, series {index}" if title == "" else title
    target = "" if one.target is None else f"class index {int(one.target[0])}; "
    subtitle = f"{target}against {one.baseline_name}{'' if base is None else ' (dotted)'}"
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
    """How many series have which rank correlation; the line is the mean, its band the interval."""
    known = result.spearman[np.isfinite(result.spearman)]
    edges = np.linspace(-1, 1, 21)
    middle = (edges[1:] + edges[:-1]) / 2
    figure = go.Figure()
    figure.add_bar(
        x=middle,
        y=np.histogram(known, edges)[0],
        width=0.092,
        marker={"color": [style.RED if x < 0 else style.BLUE for x in middle], "opacity": 0.75},
        showlegend=False,
        **marks.hovered("Spearman near %{x:.2f}<br>%{y} series"),
    )
    if np.isfinite(result.low):
        look = {"fillcolor": style.INK, "opacity": 0.12, "line_width": 0}
        figure.add_vrect(x0=result.low, x1=result.high, **look)
    if np.isfinite(result.mean):
        figure.add_vline(x=result.mean, line={"color": style.INK, "width": 2})
    label = "Spearman's correlation, one per series"
    figure.update_xaxes(title={"text": label}, range=[-1.02, 1.02], zeroline=True)
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


@draw.register
@checked
def draw_deletion_insertion(result: DeletionInsertion, *, title: str | None = "") -> go.Figure:
    """Mean curves with their intervals over series, beside random orders.

    Deletion should fall fast, insertion should rise fast; grey lines are random orders.
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
    curves = []
    for row, kind in enumerate(("deletion", "insertion"), start=1):
        place: dict[str, Any] = {"row": row, "col": 1}
        once = {"showlegend": row == 1, **place}
        mean, random = getattr(result, kind).mean(0), getattr(result, f"random_{kind}").mean(1)
        curves += [mean, *random]
        for one in random:
            marks.curve(figure, percent, one, style.FAINT, 1, **place)
        name, said = f"random orders ({len(random)})", "%{x:.0f} % at random<br>%{y:.3g}"
        marks.curve(figure, percent, random.mean(0), style.MUTED, name=name, said=said, **once)
        marks.band(figure, percent, *result.intervals(kind), style.BLUE_BAND, **place)
        name, said = result.method.replace("_", " "), f"%{{x:.0f}} %, {kind}<br>%{{y:.3g}}"
        marks.curve(figure, percent, mean, style.BLUE, 2.5, name=name, said=said, **once)
    # Both panels show one quantity, so they share their ends.
    ends = np.array([np.min(curves), np.max(curves)])
    ends += np.array([-0.06, 0.06]) * max(float(np.ptp(ends)), 1e-12)
    figure.update_yaxes(range=ends, zeroline=False, nticks=6)
    figure.update_xaxes(zeroline=False)
    figure.update_xaxes(title={"text": "units replaced, or put back (%)"}, row=2, col=1)
    marks.headings_left(figure)
    figure.update_layout(legend={"y": 1 + 22 / height, "yanchor": "bottom"})
    above = style.label_above(figure, quantity(result.measure, result.measure_unit, "value"), 52)
    heading = "Deletion and insertion" if title == "" else title
    subtitle = f"{len(result.deletion)} series; against {result.baseline_name}"
    size = {"plot_height": height, "above": above, "below": 50, "left": 50}
    return style.finish(figure, heading, subtitle, **size)


@draw.register
@checked
def draw_surrogate(result: Surrogate, *, title: str | None = "") -> go.Figure:
    """Held-out predictions against the model's output, and the strongest weights if it explains."""
    explained = result.explanation is not None and len(result.explanation) > 0
    frame = result.to_dataframe()[:MOST_WEIGHTS]
    each, scatter, gap = 34, 240, 76
    height = scatter + (gap + each * len(frame) if explained else 0)
    heights = [scatter, each * len(frame)] if explained else [scatter]
    spacing = gap / height if explained else 0
    figure = make_subplots(rows=len(heights), cols=1, row_heights=heights, vertical_spacing=spacing)
    both = np.concatenate([result.output, result.predicted])
    place: dict[str, Any] = {"row": 1, "col": 1}
    ends = marks.diagonal(figure, both.min(), both.max(), **place)
    said, look = "model %{x:.3g}<br>surrogate %{y:.3g}", {"opacity": 0.45}
    x, y = result.output, result.predicted
    marks.dots(figure, x, y, style.BLUE, 5, look=look, said=said, **place)
    measure = quantity(result.measure, result.measure_unit, "value")
    figure.update_xaxes(title={"text": f"the model's {measure}"}, range=ends, **place)
    figure.update_yaxes(range=ends, nticks=6, **place)
    if explained:
        weights = np.asarray(frame["weight"], dtype=float)
        _weights(figure, list(frame["feature"]), weights)
        per = "share of the explained variance"
        if result.kind == "linear":
            per = f"weight: {measure} per standard deviation"
        figure.update_xaxes(title={"text": per}, row=2, col=1)
    above = style.label_above(figure, "held-out prediction of the surrogate")
    state = "" if explained else " explains nothing"
    heading = f"{result.kind.capitalize()} surrogate{state}" if title == "" else title
    subtitle = (
        f"held-out R² {number(result.fidelity)} [{number(result.low)}, {number(result.high)}], "
        f"shuffled {number(result.shuffled)}, needed {result.threshold:g}"
    )
    size = {"plot_height": height, "above": above, "below": 50, "left": 50}
    return style.finish(figure, heading, subtitle, **size)


def _weights(figure: go.Figure, features: list[str], weights: np.ndarray) -> None:
    """A bar per feature in the second panel, its name above it."""
    at = np.arange(len(weights), dtype=float)
    figure.add_bar(
        x=weights,
        y=at + 0.18,
        width=0.42,
        orientation="h",
        marker={"color": [style.RED if w < 0 else style.BLUE for w in weights], "opacity": 0.8},
        showlegend=False,
        row=2,
        col=1,
        **marks.hovered(
            [f"{f}<br>{number(w, signed=True)}" for f, w in zip(features, weights, strict=True)]
        ),
    )
    for place, name in zip(at, features, strict=True):
        figure.add_annotation(
            text=style.shortened(name, 46), x=0, xref="x2 domain", y=place - 0.22, yref="y2",
            showarrow=False, xanchor="left", font={"size": 11, "color": style.INK},
        )  # fmt: skip
    wide = float(np.abs(weights).max()) * 1.06
    span = [-wide, wide] if weights.min() < 0 else [0, wide]
    figure.update_xaxes(range=span, zeroline=True, row=2, col=1)
    bottom = len(weights) - 0.4
    hidden = {"showticklabels": False, "showgrid": False}
    figure.update_yaxes(range=[bottom, -0.55], row=2, col=1, **hidden)
