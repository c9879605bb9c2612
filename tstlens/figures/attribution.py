"""Direct logit attributions: bars by component, and a map of components by position."""

from __future__ import annotations

from typing import Literal

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Count, Positive, checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.words import number, when
from tstlens.patching import LogitAttribution
from tstlens.stats import half_width


@draw.register
@checked
def draw_logit_attribution(
    result: LogitAttribution,
    *,
    kind: Literal["map", "bars"] = "map",
    series: int | None = None,
    most: Count = 40,
    title: str | None = "",
    limits: Positive | None = None,
) -> go.Figure:
    """What each component wrote to the output: by position as a map, or summed as bars.

    Blue raises the output, red lowers it. Bars are in the order of the forward pass, end with the
    head's bias, and add up to the output given in the subtitle; their whiskers are 95 % intervals
    of the mean over series. What can mislead: as for :func:`tstlens.patching.logit_attribution`;
    and large contributions of opposite sign often cancel, so read both ends of the scale. Channels
    are summed where there are several.

    Args:
        kind: ``"map"`` or ``"bars"``.
        series: show this one; None for the mean over series.
        most: components shown, the largest in size; the others are summed into one row.
        limits: end of the zero-centred scale.

    Raises:
        ArgumentError: no such series.

    Example:
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("max", n_classes=5)))
        >>> import torch
        >>> parts = patching.logit_attribution(model, torch.randn(8, 3, 20), labels=2)
        >>> figure = parts.figure(kind="bars")
    """
    each = result.values.double().cpu().numpy()
    if "channel" in result.axes:
        each = each.sum(result.axes.index("channel"))
    outputs = result.output.double().cpu().numpy()
    constants = result.constant.double().cpu().numpy()
    which = "averaged over series"
    if "series" in result.axes:
        which = f"mean over {len(each)} series"
        if series is not None:
            which, at = f"series {series}", [marks.row_of(series, len(each), "series")]
            each, outputs, constants = each[at], outputs[at], constants[at]
    else:
        if series is not None:
            raise ArgumentError(f"series={series}: the result was averaged over series before")
        each, outputs, constants = each[None], outputs[None], constants[None]
    if not len(each):
        raise ArgumentError("expected at least one series, got none")
    names, each = _largest([str(part) for part in result.components], each, most)
    heading = f"What wrote the {result.target}" if title == "" else title
    bias, unit = constants.mean(), result.unit
    subtitle = (
        f"{which}; output {number(outputs.mean())} = components "
        f"{number(outputs.mean() - bias)}, head bias {number(bias, signed=True)}; "
        f"{result.pooling} pooling"
    )
    if kind == "bars":
        by_part = np.concatenate([each.sum(2), constants[:, None]], 1)
        return _bars([*names, "head bias"], by_part, unit, heading, subtitle, limits)
    values = each.mean(0)
    end = limits or style.symmetric_limit(float(np.abs(values).max(initial=0.0)))
    cells = result.time_cells
    if cells is not None and len(cells) != values.shape[1]:
        cells = None

    def said(row: int, pos: int) -> str:
        place = when(cells[pos]) if cells is not None else f"position {pos}"
        return f"<b>{names[row]}, {place}</b><br>{number(values[row, pos], signed=True)} {unit}"

    figure = heat_maps(
        [Panel("", values, marks.each_cell(values.shape, said))],
        Ticks("", tuple(names)),
        Ticks.of("pos", range(values.shape[1]), cells),
        Scale(f"contribution ({unit})", -end, end),
        title=heading,
        subtitle=subtitle,
    )
    return marks.title_at_edge(figure)


def _largest(names: list[str], each: np.ndarray, most: int) -> tuple[list[str], np.ndarray]:
    """The components with the largest sums in size, in their order, the others summed."""
    if len(names) <= most:
        return names, each
    size = np.abs(each.mean(0)).sum(1)
    kept = np.sort(np.argsort(-size, kind="stable")[:most])
    rest = np.setdiff1d(np.arange(len(names)), kept)
    shown = [*(names[at] for at in kept), f"{len(rest)} others"]
    return shown, np.concatenate([each[:, kept], each[:, rest].sum(1, keepdims=True)], 1)


def _bars(
    names: list[str],
    each: np.ndarray,
    unit: str,
    heading: str | None,
    subtitle: str,
    limits: float | None,
) -> go.Figure:
    mean = each.mean(0)
    said = [
        f"<b>{name}</b><br>{number(value, signed=True)} {unit}"
        for name, value in zip(names, mean, strict=True)
    ]
    error = {}
    if len(each) >= 5:
        half = half_width(each)
        line = {"color": style.INK, "thickness": 1.2, "width": 0}
        error["error_x"] = {"type": "data", "array": half, **line}
        said = [
            f"{text}<br>95 % CI {number(value - by, signed=True)} to "
            f"{number(value + by, signed=True)}"
            for text, value, by in zip(said, mean, half, strict=True)
        ]
    figure = go.Figure()
    figure.add_bar(
        x=mean,
        y=np.arange(len(names)),
        orientation="h",
        marker={"color": [style.RED if value < 0 else style.BLUE for value in mean]},
        opacity=0.85,
        showlegend=False,
        **marks.hovered(said),
        **error,
    )
    figure.update_layout(bargap=0.25)
    marks.named_rows(figure, names, range=[len(names) - 0.4, -0.6])
    label = f"contribution ({unit})"
    figure.update_xaxes(title={"text": label}, zeroline=True, zerolinewidth=1.5, nticks=6)
    if limits:
        figure.update_xaxes(range=[-limits, limits])
    size = {"plot_height": 19 * len(names) + 12, "below": 52, "left": style.room_for(names)}
    return marks.title_at_edge(style.finish(figure, heading, subtitle, **size))
