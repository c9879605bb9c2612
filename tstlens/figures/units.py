"""Predictors per unit, for neurons and latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.figures import style
from tstlens.figures.attribution import title_at_edge
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.probes import hook_label
from tstlens.figures.words import number
from tstlens.probing.units_result import NEURONS, Units

_KINDS = ("counts", "map")
MOST_UNITS = 40
MOST_PREDICTORS = 24


@draw.register
@checked
def draw_units(
    result: Units, *, kind: str = "counts", of: str = NEURONS, title: str | None = ""
) -> go.Figure:
    """How many distinct predictors units follow, or the correlations of the clearest units.

    Args:
        result: of :func:`tstlens.probing.units`.
        kind: ``"counts"`` for the share of units by number of predictors, per kind of units;
            ``"map"`` for held-out correlations of up to 40 units with up to 24 predictors.
        of: kind of units of the map.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        UnknownNameError: another kind of drawing.
        ArgumentError: no such kind of units.
    """
    if kind not in _KINDS:
        raise UnknownNameError(kind, _KINDS, "this names how units are drawn")
    if of not in result.kinds:
        raise ArgumentError(f"expected of= one of {list(result.kinds)}, got {of!r}")
    return _counts(result, title) if kind == "counts" else _map(result, of, title)


def _counts(result: Units, title: str | None) -> go.Figure:
    figure = go.Figure()
    most = max(int(found.distinct.max(initial=0)) for found in result.kinds.values())
    top = min(most, 12)
    labels = [*map(str, range(top)), f"{top}+" if most > top else str(top)]
    colors = [style.BLUE, style.ORANGE, *style.LINES]
    summary: Any = result.summary()
    for at, (name, found) in enumerate(result.kinds.items()):
        shares = []
        for counts, alive in zip(found.distinct, found.alive, strict=True):
            one = np.bincount(np.minimum(counts[alive], top), minlength=top + 1)
            shares.append(one / max(alive.sum(), 1))
        mean = np.mean(shares, 0)
        row = summary.loc[name]
        figure.add_bar(
            x=labels,
            y=mean,
            name=f"{name}: {number(row['distinct'])} per unit",
            marker={"color": colors[at % len(colors)], "opacity": 0.8},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": np.max(shares, 0) - mean,
                "arrayminus": mean - np.min(shares, 0),
                "color": style.INK,
                "thickness": 1.2,
                "width": 0,
            },
            hovertemplate=f"{name}<br>%{{x}} predictors: %{{y:.1%}} of units<extra></extra>",
        )
    figure.update_xaxes(title={"text": "distinct predictors that a unit follows"}, type="category")
    figure.update_yaxes(tickformat=".0%", zeroline=False, nticks=6)
    above = style.label_above(figure, "share of units that vary")
    gains = [f"{name} {number(row['gain'])}" for name, row in summary.iterrows() if name != NEURONS]
    subtitle = (
        f"confirmed on held-out series, |r| ≥ {result.least_r:g}; bars: mean of "
        f"{len(result.seeds)} splits, lines: their range"
    )
    if gains:
        subtitle += f"; gain over neurons: {', '.join(gains)}"
    heading = f"What units follow: {hook_label(result.hook)}" if title == "" else title
    entries = len(result.kinds)
    below = 70 + 22 * entries
    style.finish(figure, heading, subtitle, plot_height=260, above=above, below=below, left=52)
    legend = {"y": -50 / 260, "yanchor": "top", "yref": "paper"}
    return title_at_edge(figure.update_layout(legend=legend, barmode="group", bargap=0.25))


def _map(result: Units, of: str, title: str | None) -> go.Figure:
    found = result.kinds[of]
    r = found.r_heldout.mean(0)
    share = found.confirmed.mean(0)
    kept = np.where(share > 0.5, r, 0.0)  # confirmed in most splits
    size = np.abs(np.nan_to_num(kept))
    units = np.argsort(-size.max(1), kind="stable")[:MOST_UNITS]
    units = units[size[units].max(1) > 0]
    if not len(units):
        raise ArgumentError(f"no predictor of {of} was confirmed in most splits: nothing to draw")
    chosen = np.sort(np.argsort(-size[units].max(0), kind="stable")[:MOST_PREDICTORS])
    chosen = chosen[size[np.ix_(units, chosen)].max(0) > 0]
    # Units that follow the same thing lie together.
    units = units[np.argsort(size[np.ix_(units, chosen)].argmax(1), kind="stable")]
    values = kept[np.ix_(units, chosen)].T
    hover = np.array(
        [
            [
                f"<b>unit {unit}</b><br>{result.predictors[predictor]}<br>held-out r "
                f"{number(r[unit, predictor], True)}<br>confirmed in "
                f"{found.confirmed[:, unit, predictor].sum()} of {len(result.seeds)} splits"
                for unit in units
            ]
            for predictor in chosen
        ],
        dtype=object,
    )
    end = style.symmetric_limit(float(np.abs(values).max()))
    figure = heat_maps(
        [Panel("", values, hover)],
        Ticks("", tuple(_short(result.predictors[index]) for index in chosen)),
        Ticks(f"unit ({of})", tuple(str(unit) for unit in units)),
        Scale("held-out Pearson r, where confirmed in most splits", -end, end),
        title=f"Units and predictors: {hook_label(result.hook)}" if title == "" else title,
        subtitle=f"the {len(units)} clearest of {found.r.shape[1]} {of}",
    )
    return title_at_edge(figure)


def _short(name: str) -> str:
    return (
        name.replace(" frequencies", " freq.")
        .replace(", mean of channels", ", mean")
        .replace("channel ", "ch ")
    )
