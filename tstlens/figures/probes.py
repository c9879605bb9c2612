"""Linear probes: scores by layer, head and position, beside what shuffled targets give.

Predictors per unit, for neurons and latents; directions, what pushing along them does, and where
two sets can be told apart; the confusion matrix of a classifier.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, bars, heat_maps
from tstlens.figures.words import (
    hook_label,
    hook_labels,
    hook_place,
    number,
    quantity,
    site_title,
    when,
)
from tstlens.probing.probes import ProbeResult
from tstlens.probing.separability_map import Separability
from tstlens.probing.steering import Direction, DoseResponse
from tstlens.probing.unit_association import NEURONS, Units
from tstlens.training import Evaluation

MOST_UNITS = 40
MOST_PREDICTORS = 24
MOST_RANDOM_LINES = 40


@draw.register
@checked
def draw_probe(
    result: ProbeResult,
    *,
    value: Literal["score", "selectivity", "shuffled", "baseline"] = "score",
    title: str | None = "",
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """A map of held-out scores; or, with one probe per hook point, scores with their intervals.

    What can mislead: the brightest cell was picked among many; late positions of padded data are
    observed in the long series only, see ``value="baseline"``.

    Args:
        value: ``"score"``, ``"selectivity"`` (score less shuffled), ``"shuffled"`` or
            ``"baseline"``.
        limits: (low, high) of the colours; by default from 0 (or the lowest R²) to 1.
    """
    heading = _heading(result) if title == "" else title
    if len(result.axes) == 1:
        return _points(result, heading)
    shown = {
        "score": result.values,
        "selectivity": result.selectivity,
        "shuffled": result.shuffled.mean(0),
        "baseline": result.baseline,
    }[value]
    names = hook_labels(result.coords["hook"])
    said = _said(result, names)
    columns = Ticks.of(result.axes[-1], result.coords[result.axes[-1]], result.time_cells)
    panels, rows = [Panel("", shown, said)], Ticks("", names)
    if len(result.axes) > 2:  # one map [head, pos] per hook point
        panels = [Panel(name, shown[at], said[at]) for at, name in enumerate(names)]
        rows = Ticks.of("head", result.coords["head"])
    ends = limits or (min(0.0, float(np.nanmin(shown, initial=0.0))), 1.0)
    label = {"score": f"held-out {result.score}", "shuffled": f"{result.score}, targets shuffled"}
    scale = Scale(label.get(value, f"{value} ({result.score})"), *ends, diverging=False)
    figure = heat_maps(panels, rows, columns, scale, title=heading, subtitle=_subtitle(result))
    return marks.title_at_edge(figure)


def _heading(result: ProbeResult) -> str:
    what = "the class" if result.target == "labels" else result.target.replace("_", " ")
    kinds = {hook.rsplit("hook_", 1)[-1] for hook in result.coords["hook"]}
    where = f" from {site_title(kinds.pop())}" if len(kinds) == 1 else ""
    return f"A linear probe reads {what}{where}"


def _subtitle(result: ProbeResult) -> str:
    shuffled = f"targets shuffled {number(float(np.nanmean(result.shuffled)))}"
    usual = "majority" if result.score == "accuracy" else "mean"
    n_train, n_test = result.made.get("n_series", (0, 0))
    folds = result.made.get("folds")
    series = f"{folds}-fold over {n_train} series" if folds else f"{n_test} held-out series"
    baseline = number(float(np.nanmean(result.baseline)))
    return f"{series}; {result.score} with {shuffled}, {usual} {baseline}"


def _said(result: ProbeResult, names: tuple[str, ...]) -> np.ndarray:
    def text(*at: int) -> str:
        place = [names[at[0]]]
        for axis, index in zip(result.axes[1:], at[1:], strict=True):
            entry = result.coords[axis][index]
            cells = result.time_cells
            word = when(cells[entry]) if axis == "pos" and cells else f"{axis} {entry}"
            place.append(word.replace("pos ", "position "))
        shuffled = result.shuffled[(slice(None), *at)]
        return (
            f"<b>{', '.join(place)}</b><br>{result.score} {number(float(result.values[at]))} "
            f"({number(float(result.low[at]))} to {number(float(result.high[at]))})<br>"
            f"shuffled {number(float(shuffled.mean()))}, baseline "
            f"{number(float(result.baseline[at]))}<br>{int(result.n_test[at])} rows scored, "
            f"q {number(float(result.q[at]))}"
        )

    return marks.each_cell(result.values.shape, text)


def _points(result: ProbeResult, heading: str | None) -> go.Figure:
    names = hook_labels(result.coords["hook"])
    x = np.arange(len(names), dtype=float)
    figure = go.Figure()
    beside = (x[None] + marks.spread(len(result.shuffled), 0.4)[:, None]).ravel()
    random = {"name": "targets shuffled", "said": "shuffled: %{y:.3f}", "look": {"opacity": 0.6}}
    marks.dots(figure, beside, result.shuffled.ravel(), style.ORANGE, 5, **random)
    figure.add_scatter(
        x=x,
        y=result.baseline,
        mode="markers",
        name="majority" if result.score == "accuracy" else "mean",
        marker={"symbol": "line-ew", "size": 26, "line": {"width": 2, "color": style.MUTED}},
        **marks.hovered("baseline: %{y:.3f}"),
    )
    error = marks.whiskers(result.values, result.low, result.high, thickness=1.6)
    said = _said(result, names)
    marks.dots(figure, x, result.values, style.BLUE, 10, name="probe", said=said, error_y=error)
    low = min(0.0, float(np.nanmin(result.low, initial=0.0)))
    low = max(low, float(np.nanmin(result.values, initial=0.0)) - 0.2)
    figure.update_yaxes(range=[low - 0.03, 1.04], nticks=6, zeroline=False)
    figure.update_xaxes(
        tickmode="array",
        tickvals=x,
        ticktext=[style.shortened(name).replace(" ", "<br>") for name in names],
        range=[-0.5, len(x) - 0.5],
        showgrid=False,
        zeroline=False,
        tickangle=0,
    )
    above = style.label_above(figure, f"held-out {result.score}", 6)
    size = {"plot_height": 260, "above": above, "below": 84, "left": 52}
    style.finish(figure, heading, _subtitle(result), **size)
    return marks.title_at_edge(marks.legend_below(figure, 48, 260))


@draw.register
@checked
def draw_units(
    result: Units,
    *,
    kind: Literal["counts", "map"] = "counts",
    of: str = NEURONS,
    title: str | None = "",
) -> go.Figure:
    """How many distinct predictors units follow, or the correlations of the clearest units.

    Args:
        kind: ``"counts"`` for the share of units by number of predictors, per kind of units;
            ``"map"`` for held-out correlations of up to 40 units with up to 24 predictors.
        of: kind of units of the map.

    Raises:
        ArgumentError: no such kind of units.
    """
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
        reach = np.min(shares, 0), np.max(shares, 0)
        figure.add_bar(
            x=labels,
            y=mean,
            name=f"{name}: {number(summary.loc[name]['distinct'])} per unit",
            marker={"color": colors[at % len(colors)], "opacity": 0.8},
            error_y=marks.whiskers(mean, *reach, thickness=1.2),
            **marks.hovered(f"{name}<br>%{{x}} predictors: %{{y:.1%}} of units"),
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
    size = {"plot_height": 260, "above": above, "below": 70 + 22 * len(result.kinds), "left": 52}
    style.finish(figure, heading, subtitle, **size)
    figure.update_layout(barmode="group", bargap=0.25)
    return marks.title_at_edge(marks.legend_below(figure, 50, 260))


def _map(result: Units, of: str, title: str | None) -> go.Figure:
    found = result.kinds[of]
    r = found.r_heldout.mean(0)
    kept = np.where(found.confirmed.mean(0) > 0.5, r, 0.0)  # confirmed in most splits
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

    def said(row: int, column: int) -> str:
        unit, predictor = units[column], chosen[row]
        return (
            f"<b>unit {unit}</b><br>{result.predictors[predictor]}<br>held-out r "
            f"{number(r[unit, predictor], True)}<br>confirmed in "
            f"{found.confirmed[:, unit, predictor].sum()} of {len(result.seeds)} splits"
        )

    end = style.symmetric_limit(float(np.abs(values).max()))
    figure = heat_maps(
        [Panel("", values, marks.each_cell(values.shape, said))],
        Ticks("", tuple(_short(result.predictors[index]) for index in chosen)),
        Ticks(f"unit ({of})", tuple(str(unit) for unit in units)),
        Scale("held-out Pearson r, where confirmed in most splits", -end, end),
        title=f"Units and predictors: {hook_label(result.hook)}" if title == "" else title,
        subtitle=f"the {len(units)} clearest of {found.r.shape[1]} {of}",
    )
    return marks.title_at_edge(figure)


def _short(name: str) -> str:
    name = name.replace(" frequencies", " freq.").replace(", mean of channels", ", mean")
    return name.replace("channel ", "ch ")


@draw.register
@checked
def draw_dose_response(result: DoseResponse, *, title: str | None = "") -> go.Figure:
    """The mean measure against the strength, with its interval, beside random directions.

    The band is the interval of the mean *change* against no push, over series; each grey line is
    one random direction of equal norm.
    """
    x = list(result.strengths)
    none = result.mean[x.index(0.0)]
    figure = go.Figure()
    lines = result.random.mean(1)
    for one in lines[:MOST_RANDOM_LINES]:
        marks.curve(figure, x, one, style.FAINT, 1)
    random = f"random directions ({len(lines)}, same norm)"
    said: Any = "strength %{x:g}, random<br>%{y:.3g}"
    marks.curve(figure, x, lines.mean(0), style.MUTED, name=random, said=said)
    marks.band(figure, x, none + result.low, none + result.high, style.BLUE_BAND)
    said = [
        f"<b>strength {dose:g}</b><br>{number(float(value))}<br>"
        f"change {number(float(change), signed=True)}, p {number(float(p))}"
        for dose, value, change, p in zip(x, result.mean, result.change, result.p, strict=True)
    ]
    name = f"the direction ({result.method})"
    marks.curve(figure, x, result.mean, style.BLUE, 2.5, name=name, said=said, dots=6)
    figure.update_xaxes(title={"text": f"strength ({result.unit})"}, zeroline=False)
    figure.update_yaxes(zeroline=False, nticks=6)
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"})
    heading = f"Steering {hook_place(result.hook)}" if title == "" else title
    subtitle = f"{len(result.values)} series; {100 * result.level:g} % interval over series"
    label = quantity(result.measure, result.measure_unit, "value")
    above = style.label_above(figure, label, 30)
    return style.finish(figure, heading, subtitle, plot_height=260, above=above, below=52, left=52)


@draw.register
@checked
def draw_separability(result: Separability, *, title: str | None = "") -> go.Figure:
    """Held-out AUC by layer and position, light at chance; numbers and p on hover."""
    p, high, cells = result.p, result.null_95, result.time_cells

    def said(row: int, pos: int) -> str:
        place = f"position {pos}"
        if cells is not None and cells[pos][1] > cells[pos][0]:
            place = when(cells[pos])
        return (
            f"<b>{result.hooks[row]}</b><br>{place}<br>AUC {number(float(result.auc[row, pos]))}, "
            f"null below {number(float(high[row, pos]))}<br>p {number(float(p[row, pos]))}, "
            f"{result.n_series[row, pos]} series"
        )

    made = result.made
    return heat_maps(
        [Panel("", result.auc, marks.each_cell(result.auc.shape, said))],
        Ticks("", tuple(hook_label(name) for name in result.hooks)),
        Ticks.of("pos", range(result.auc.shape[1]), cells),
        Scale("held-out AUC (0.5 is chance)", 0.5, 1.0, diverging=False),
        title="Where the two sets can be told apart" if title == "" else title,
        subtitle=(
            f"{made.get('n_a')} and {made.get('n_b')} series, {made.get('n_splits')} folds; null "
            f"mean {number(float(np.nanmean(result.null)))}"
        ),
    )


@draw.register
@checked
def draw_direction(result: Direction, *, most: Count = 40, title: str | None = "") -> go.Figure:
    """The ``most`` largest entries of a direction, largest first."""
    frame = result.to_dataframe()
    frame = frame.sort_values("value", key=abs, ascending=False, kind="stable")[:most]
    labels = [
        f"H{row.head}:{row.feature}" if "head" in frame else str(row.feature)
        for row in frame.itertuples()
    ]
    values = np.asarray(frame["value"], dtype=float)
    end = style.symmetric_limit(float(np.abs(values).max())) * 1.05
    said = [
        f"dimension {label}<br>{number(float(value), signed=True)}"
        for label, value in zip(labels, values, strict=True)
    ]
    heading = f"Direction in {hook_place(result.hook)}" if title == "" else title
    subtitle = f"{result.method}, norm {number(result.norm)}: {result.unit}"
    ticks = Ticks("dimension, largest first", tuple(labels))
    scale = Scale("entry of the vector", -end, end)
    return bars(ticks, values, said, scale, title=heading, subtitle=subtitle)


@checked
def confusion(evaluation: Evaluation, *, title: str | None = "") -> go.Figure:
    """Series by true class (rows) and predicted class (columns): right in blue, errors in orange.

    Colours are shares of the true class; the cells print counts of series. What can mislead: a
    class with few series turns dark with one error, so read the counts.

    Args:
        evaluation: of a classifier on one split.
        title: "" for one with the accuracy, None for none.

    Returns:
        A plotly figure.

    Example:
        >>> from tstlens.data import load_dataset
        >>> from tstlens.training import ConvTST, evaluate
        >>> data = load_dataset("ItalyPowerDemand")
        >>> figure = confusion(evaluate(ConvTST(n_channels=1, n_time=24, n_classes=2), data))
    """
    counts = evaluation.confusion.double().cpu().numpy()
    names = list(evaluation.class_names)
    of_class = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(of_class, 1)
    right = np.eye(len(names), dtype=bool)

    def said(row: int, column: int) -> str:
        return (
            f"<b>{int(counts[row, column])} of {int(of_class[row, 0])} series</b> "
            f"({100 * shares[row, column]:.1f} %)<br>true class {names[row]}"
            f"<br>predicted {names[column]}"
        )

    hover = marks.each_cell(counts.shape, said)
    text = np.where(counts > 0, counts.astype(int).astype(str), "")
    figure = go.Figure()
    for scale, where in ((style.RIGHT, right), (style.WRONG, ~right)):
        drawn = where & ((counts > 0) | right)
        figure.add_heatmap(
            z=np.where(drawn, shares, np.nan),
            x=list(range(len(names))),
            y=list(range(len(names))),
            text=np.where(drawn, text, ""),
            texttemplate="%{text}" if len(names) <= 20 else None,
            textfont={"size": 12},
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            zmin=0,
            # An error shows from its first few series: half a class wrong is as dark as it gets.
            zmax=1 if scale is style.RIGHT else 0.5,
            colorscale=scale,
            showscale=False,
            hoverongaps=False,
            xgap=1,
            ygap=1,
        )
    size = max(24, min(36, 480 // max(1, len(names))))
    ticks = {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [style.shortened(name, 14) for name in names],
        "showgrid": False,
        "zeroline": False,
        "showline": True,
    }
    long = max((len(name) for name in names), default=0) > 4
    figure.update_xaxes(title={"text": "predicted class"}, tickangle=-40 if long else 0, **ticks)
    figure.update_yaxes(title={"text": "true class"}, autorange="reversed", **ticks)
    heading = f"{evaluation.n_correct} of {evaluation.n} right ({100 * evaluation.accuracy:.1f} %)"
    return style.finish(
        figure,
        heading if title == "" else title,
        "series by true and predicted class",
        plot_height=size * max(3, len(names)),
        below=110 if long else 52,
        left=style.room_for(ticks["ticktext"], "true class"),
    )
