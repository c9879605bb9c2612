"""Similarity of layers as a map, and what skipping runs of layers costs."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import UnknownNameError
from tstlens.figures import style
from tstlens.figures.attribution import title_at_edge
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.probes import hook_labels
from tstlens.figures.words import number
from tstlens.probing.similarity_cka import Similarity
from tstlens.probing.similarity_skipping import SkipCost

_VALUES = ("change", "accuracy", "changed")


@draw.register
@checked
def draw_similarity(result: Similarity, *, title: str | None = "") -> go.Figure:
    """Linear CKA between hook points.

    Args:
        result: of :func:`tstlens.probing.similarity`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    rows, columns = hook_labels(result.hooks_a), hook_labels(result.hooks_b)
    hover = np.array(
        [
            [
                f"<b>{a} and {b}</b><br>CKA {number(result.values[i, j])}<br>series shuffled "
                f"{number(result.null[i, j])} (at most {number(result.null_high[i, j])})"
                for j, b in enumerate(columns)
            ]
            for i, a in enumerate(rows)
        ],
        dtype=object,
    )
    name_a, name_b = result.names
    heading = f"How alike layers are: {name_a}"
    same_axis = name_a == name_b
    if not same_axis:
        heading += f" and {name_b}"
    low = min(0.0, float(np.nanmin(result.values)))
    estimate = "debiased" if result.debiased else "plain"
    figure = heat_maps(
        [Panel("", result.values, hover)],
        Ticks("" if same_axis else name_a, rows),
        Ticks("" if same_axis else name_b, tuple(name.replace(" ", "<br>") for name in columns)),
        Scale(f"linear CKA ({estimate})", low, 1.0, diverging=False),
        title=heading if title == "" else title,
        subtitle=(
            f"{result.n_rows} {result.rows}; series shuffled: "
            f"{number(float(np.nanmean(result.null)))} on average"
        ),
    )
    return title_at_edge(figure.update_xaxes(tickangle=0))


@draw.register
@checked
def draw_skip_cost(result: SkipCost, *, value: str = "change", title: str | None = "") -> go.Figure:
    """What skipping every run of layers does to the metric.

    Args:
        result: of :func:`tstlens.probing.skip_cost`.
        value: ``"change"`` of the metric, ``"accuracy"``, or ``"changed"`` (share of series that
            are given another class).
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        UnknownNameError: another value.
    """
    if value not in _VALUES:
        raise UnknownNameError(value, _VALUES, "this names what a figure shows")
    shown = getattr(result, value)
    n = len(shown)
    hover = np.full((n, n), "", dtype=object)
    for first in range(n):
        for last in range(first, n):
            at = first, last
            which = f"layer {first}" if first == last else f"layers {first} to {last}"
            hover[at] = (
                f"<b>without {which}</b><br>{result.metric}: {number(result.value[at])}<br>change "
                f"{number(result.change[at], True)} ({number(result.low[at], True)} to "
                f"{number(result.high[at], True)})<br>accuracy {number(result.accuracy[at])}"
            )
    if value == "change":
        end = style.symmetric_limit(float(np.nanmax(np.abs(shown))))
        scale = Scale(f"change of {result.metric}", -end, end, better=result.better)
    else:
        label = "accuracy" if value == "accuracy" else "share of series with another class"
        scale = Scale(label, 0.0, 1.0, diverging=False)
    layers = tuple(f"L{layer}" for layer in range(n))
    figure = heat_maps(
        [Panel("", shown, hover)],
        Ticks("first skipped", layers),
        Ticks("last skipped", layers),
        scale,
        title="What skipping layers costs" if title == "" else title,
        subtitle=(
            f"{result.made.get('n_series', '?')} series; whole model "
            f"{number(result.full[0])}, accuracy {number(result.full[1])}"
        ),
    )
    return title_at_edge(figure)
