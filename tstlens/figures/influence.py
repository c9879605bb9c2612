"""Which heads listen to which: the influence matrix as a map."""

from __future__ import annotations

from itertools import product

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.words import number
from tstlens.patching import Influence

_LABELS = {
    "normalized": "change as a share of the listener's own gap (root mean square)",
    "signed": "share of the listener's gap closed",
    "mean_squared": "mean squared change of what the listener writes",
}


@draw.register
@checked
def draw_influence(
    result: Influence,
    *,
    kind: str = "signed",
    pair: int | None = None,
    title: str | None = "",
    limits: float | None = None,
) -> go.Figure:
    """Patched heads down, listening heads across; blank where the listener does not come later.

    What can mislead: influence runs along all routes, so a dark cell is no edge; and what moves a
    head need not move the output.

    Args:
        result: of :func:`tstlens.patching.head_influence`.
        kind: "signed" (share of the listener's gap closed), "normalized" (size of the change
            against that gap) or "mean_squared".
        pair: show this pair only; None for the mean over pairs.
        title: "" for one made from the result, None for none.
        limits: the end of the colour scale.

    Returns:
        A plotly figure.

    Raises:
        UnknownNameError: another kind.
        ArgumentError: no such pair, or a single layer.
    """
    if kind not in _LABELS:
        raise UnknownNameError(kind, _LABELS, "this names what a figure shows")
    if "pair" not in result.axes and pair is not None:
        raise ArgumentError(f"pair={pair}: the result was averaged over pairs before")
    if pair is None:
        one = result.mean()
    else:
        if not -result.n_pairs <= pair < result.n_pairs:
            raise ArgumentError(f"expected pair in 0..{result.n_pairs - 1}, got {pair}")
        at = slice(pair % result.n_pairs, pair % result.n_pairs + 1)
        one = Influence(
            result.values[at], result.projection[at], result.gap[at], result.axes, result.unit, 1
        ).mean()
    chosen = {"normalized": one.normalized, "signed": one.signed}
    values = (chosen[kind]() if kind in chosen else one.values).double().cpu().numpy()
    n_layers, n_units = values.shape[:2]
    if n_layers < 2:
        raise ArgumentError("expected at least two layers: heads of one layer do not influence")
    letter = "H" if result.unit == "head" else "S"
    names = [f"L{layer}{letter}{unit}" for layer in range(n_layers) for unit in range(n_units)]
    square = values.reshape(n_layers * n_units, n_layers * n_units)
    layer = np.arange(len(names)) // n_units
    square = np.where(layer[:, None] < layer[None], square, np.nan)[:-n_units, n_units:]
    rows, columns = names[:-n_units], names[n_units:]
    hover = np.empty(square.shape, dtype=object)
    for i, j in product(range(len(rows)), range(len(columns))):
        value = float(square[i, j])
        hover[i, j] = (
            f"<b>{rows[i]} → {columns[j]}</b><br>" + number(value, signed=kind == "signed")
            if value == value
            else f"{columns[j]} does not come after {rows[i]}"
        )
    known = square[np.isfinite(square)]
    end = limits or float(np.abs(known).max(initial=0.0)) or 1.0
    scale = Scale(_LABELS[kind], -end if kind == "signed" else 0.0, end, kind == "signed")
    heading = f"What patching one {result.unit} does to later ones" if title == "" else title
    which = f"pair {pair}" if pair is not None else f"mean over {result.n_pairs} pairs"
    return heat_maps(
        [Panel("", square, hover)],
        Ticks(f"patched {result.unit}", tuple(rows)),
        Ticks(f"listening {result.unit}", tuple(columns)),
        scale,
        title=heading,
        subtitle=which,
    )
