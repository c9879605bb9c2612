"""Linear probes: scores by layer, head and position, beside what shuffled targets give.

Predictors per unit, for neurons and latents.

Directions, what pushing along them does, and where two sets can be told apart.

The confusion matrix of a classifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.figures import style
from tstlens.figures.attribution import title_at_edge
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, bars, heat_maps
from tstlens.figures.words import number, quantity, site_title, when
from tstlens.probing.extraction import layer_of
from tstlens.probing.probes import ProbeResult
from tstlens.probing.separability_map import Separability
from tstlens.probing.steering import Direction, DoseResponse
from tstlens.probing.unit_association import NEURONS, Units
from tstlens.training import Evaluation

_VALUES = ("score", "selectivity", "shuffled", "baseline")


@draw.register
@checked
def draw_probe(
    result: ProbeResult,
    *,
    value: str = "score",
    title: str | None = "",
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """A map of held-out scores; or, with one probe per hook point, scores with their intervals.

    What can mislead: the brightest cell was picked among many; late positions of padded data are
    observed in the long series only, see ``value="baseline"``.

    Args:
        result: of :func:`tstlens.probing.probe`.
        value: ``"score"``, ``"selectivity"`` (score less shuffled), ``"shuffled"`` or
            ``"baseline"``.
        title: "" for one made from the result, None for none.
        limits: (low, high) of the colours; by default from 0 (or the lowest R²) to 1.

    Returns:
        A plotly figure.

    Raises:
        UnknownNameError: another value.
    """
    if value not in _VALUES:
        raise UnknownNameError(value, _VALUES, "this names what a figure shows")
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
    cells = result.time_cells
    hover = _hover(result, names)
    columns = Ticks.of(result.axes[-1], result.coords[result.axes[-1]], cells)
    if len(result.axes) == 2:
        panels = [Panel("", shown, hover)]
        rows = Ticks("", names)
    else:
        panels = [
            Panel(name, shown[at], hover[at]) for at, name in enumerate(names)
        ]  # one map [head, pos] per hook point
        rows = Ticks.of("head", result.coords["head"])
    low = min(0.0, float(np.nanmin(shown, initial=0.0)))
    ends = limits or (low, 1.0)
    label = {"score": f"held-out {result.score}", "shuffled": f"{result.score}, targets shuffled"}
    wording = label.get(value, f"{value} ({result.score})")
    scale = Scale(wording, *ends, diverging=False)
    figure = heat_maps(panels, rows, columns, scale, title=heading, subtitle=_subtitle(result))
    return title_at_edge(figure)


def hook_label(hook: str) -> str:
    """A hook point in a title: "L1 resid_post", "L1 latents"."""
    kind, layer = hook.rsplit("hook_", 1)[-1], layer_of(hook)
    if hook.endswith("hook_sae_acts_post"):
        kind = "latents"
    elif hook.rsplit(".", 2)[-2:-1] == ["mlp"]:
        kind = f"mlp_{kind}"
    return kind if layer is None else f"L{layer} {kind}"


def hook_labels(hooks: tuple[str, ...]) -> tuple[str, ...]:
    """Hook points as ticks say them: "L0 resid_post", or "L0" where all are of one kind."""
    labels = tuple(hook_label(hook) for hook in hooks)
    in_layers = all(layer_of(hook) is not None for hook in hooks)
    if in_layers and len({label.split(" ")[1] for label in labels}) == 1:
        labels = tuple(label.split(" ")[0] for label in labels)
    return labels if len(set(labels)) == len(labels) else hooks


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


def _hover(result: ProbeResult, names: tuple[str, ...]) -> np.ndarray:
    text = np.empty(result.values.shape, dtype=object)
    for at in np.ndindex(*result.values.shape):
        place = [names[at[0]]]
        for axis, index in zip(result.axes[1:], at[1:], strict=True):
            entry = result.coords[axis][index]
            cells = result.time_cells
            word = when(cells[entry]) if axis == "pos" and cells else f"{axis} {entry}"
            place.append(word.replace("pos ", "position "))
        shuffled = result.shuffled[(slice(None), *at)]
        text[at] = (
            f"<b>{', '.join(place)}</b><br>{result.score} {number(float(result.values[at]))} "
            f"({number(float(result.low[at]))} to {number(float(result.high[at]))})<br>"
            f"shuffled {number(float(shuffled.mean()))}, baseline "
            f"{number(float(result.baseline[at]))}<br>{int(result.n_test[at])} rows scored, "
            f"q {number(float(result.q[at]))}"
        )
    return text


def _points(result: ProbeResult, heading: str | None) -> go.Figure:
    names = hook_labels(result.coords["hook"])
    x = np.arange(len(names), dtype=float)
    figure = go.Figure()
    spread = (np.arange(len(result.shuffled)) % 7 - 3) / 7 * 0.4
    figure.add_scatter(
        x=(x[None] + spread[:, None]).ravel(),
        y=result.shuffled.ravel(),
        mode="markers",
        name="targets shuffled",
        marker={"size": 5, "color": style.ORANGE, "opacity": 0.6},
        hovertemplate="shuffled: %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=x,
        y=result.baseline,
        mode="markers",
        name="majority" if result.score == "accuracy" else "mean",
        marker={"symbol": "line-ew", "size": 26, "line": {"width": 2, "color": style.MUTED}},
        hovertemplate="baseline: %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=x,
        y=result.values,
        mode="markers",
        name="probe",
        marker={"size": 10, "color": style.BLUE},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": result.high - result.values,
            "arrayminus": result.values - result.low,
            "color": style.INK,
            "thickness": 1.6,
            "width": 0,
        },
        hovertext=list(_hover(result, names)),
        hovertemplate="%{hovertext}<extra></extra>",
    )
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
    style.finish(
        figure, heading, _subtitle(result), plot_height=260, above=above, below=84, left=52
    )
    legend = {"y": -48 / 260, "yanchor": "top", "yref": "paper"}
    return title_at_edge(figure.update_layout(legend=legend))


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


MOST_RANDOM_LINES = 40


@draw.register
@checked
def draw_dose_response(result: DoseResponse, *, title: str | None = "") -> go.Figure:
    """The mean measure against the strength, with its interval, beside random directions.

    The band is the interval of the mean *change* against no push, over series; each grey line is
    one random direction of equal norm.

    Args:
        result: of :func:`tstlens.probing.dose_response`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    x = list(result.strengths)
    none = result.mean[x.index(0.0)]
    figure = go.Figure()
    lines = result.random.mean(1)
    for one in lines[:MOST_RANDOM_LINES]:
        figure.add_scatter(
            x=x,
            y=one,
            mode="lines",
            line={"color": style.FAINT, "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.add_scatter(
        x=x,
        y=lines.mean(0),
        mode="lines",
        name=f"random directions ({len(lines)}, same norm)",
        line={"color": style.MUTED, "width": 2},
        hovertemplate="strength %{x:g}, random<br>%{y:.3g}<extra></extra>",
    )
    known = np.isfinite(result.low)
    if known.any():
        doses = np.array(x)[known]
        figure.add_scatter(
            x=[*doses, *doses[::-1]],
            y=[*(none + result.high)[known], *(none + result.low)[known][::-1]],
            fill="toself",
            fillcolor="rgba(33,102,172,0.15)",
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
        )
    hover = [
        f"<b>strength {dose:g}</b><br>{number(float(value))}<br>"
        f"change {number(float(change), signed=True)}, p {number(float(p))}"
        for dose, value, change, p in zip(x, result.mean, result.change, result.p, strict=True)
    ]
    figure.add_scatter(
        x=x,
        y=result.mean,
        mode="lines+markers",
        name=f"the direction ({result.method})",
        line={"color": style.BLUE, "width": 2.5},
        marker={"size": 6},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
    figure.update_xaxes(title={"text": f"strength ({result.unit})"}, zeroline=False)
    figure.update_yaxes(zeroline=False, nticks=6)
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"})
    heading = f"Steering {_place(result.hook)}" if title == "" else title
    subtitle = f"{len(result.values)} series; {100 * result.level:g} % interval over series"
    label = quantity(result.measure, result.measure_unit, "value")
    above = style.label_above(figure, label, 30)
    return style.finish(figure, heading, subtitle, plot_height=260, above=above, below=52, left=52)


@draw.register
@checked
def draw_separability(result: Separability, *, title: str | None = "") -> go.Figure:
    """Held-out AUC by layer and position, light at chance; numbers and p on hover.

    Args:
        result: of :func:`tstlens.probing.separability`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    n_pos = result.auc.shape[1]
    columns = Ticks.of("pos", range(n_pos), result.time_cells)
    rows = Ticks("", tuple(_short_inputs(name) for name in result.hooks))
    p, high = result.p, np.quantile(result.null, 0.95, axis=0)
    hover = np.empty(result.auc.shape, dtype=object)
    for row, pos in np.ndindex(*hover.shape):
        place = f"position {pos}"
        if result.time_cells is not None and result.time_cells[pos][1] > result.time_cells[pos][0]:
            place = when(result.time_cells[pos])
        hover[row, pos] = (
            f"<b>{result.hooks[row]}</b><br>{place}<br>AUC {number(float(result.auc[row, pos]))}, "
            f"null below {number(float(high[row, pos]))}<br>p {number(float(p[row, pos]))}, "
            f"{result.n_series[row, pos]} series"
        )
    heading = "Where the two sets can be told apart" if title == "" else title
    made = result.made
    subtitle = (
        f"{made.get('n_a')} and {made.get('n_b')} series, {made.get('n_splits')} folds; null mean "
        f"{number(float(np.nanmean(result.null)))}"
    )
    scale = Scale("held-out AUC (0.5 is chance)", 0.5, 1.0, diverging=False)
    panel = Panel("", result.auc, hover)
    return heat_maps([panel], rows, columns, scale, title=heading, subtitle=subtitle)


@draw.register
@checked
def draw_direction(result: Direction, *, most: Count = 40, title: str | None = "") -> go.Figure:
    """The largest entries of a direction, largest first.

    Args:
        result: of :func:`tstlens.probing.direction`.
        most: how many entries.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: fewer than 1 entry asked for.
    """
    if most < 1:
        raise ArgumentError(f"expected most of at least 1, got {most}")
    frame = result.to_dataframe()
    frame = frame.sort_values("value", key=abs, ascending=False, kind="stable")[:most]
    labels = [
        f"H{row.head}:{row.feature}" if "head" in frame else str(row.feature)
        for row in frame.itertuples()
    ]
    values = np.asarray(frame["value"], dtype=float)
    end = style.symmetric_limit(float(np.abs(values).max())) * 1.05
    hover = [
        f"dimension {label}<br>{number(float(value), signed=True)}"
        for label, value in zip(labels, values, strict=True)
    ]
    heading = f"Direction in {_place(result.hook)}" if title == "" else title
    subtitle = f"{result.method}, norm {number(result.norm)}: {result.unit}"
    ticks = Ticks("dimension, largest first", tuple(labels))
    scale = Scale("entry of the vector", -end, end)
    return bars(ticks, values, hover, scale, title=heading, subtitle=subtitle)


def _short_inputs(hook: str) -> str:
    """``blocks.1.hook_resid_post`` as "L1 resid_post"."""
    leaf = hook.rsplit("hook_", 1)[-1]
    parts = hook.split(".")
    return f"L{parts[1]} {leaf}" if parts[0] == "blocks" else leaf


def _place(hook: str) -> str:
    leaf = hook.rsplit("hook_", 1)[-1]
    parts = hook.split(".")
    layer = f", layer {parts[1]}" if parts[0] == "blocks" else ""
    return f"{site_title(leaf)}{layer}"


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
    hover = np.array(
        [
            [
                f"<b>{int(counts[row, column])} of {int(of_class[row, 0])} series</b> "
                f"({100 * shares[row, column]:.1f} %)<br>true class {names[row]}"
                f"<br>predicted {names[column]}"
                for column in range(len(names))
            ]
            for row in range(len(names))
        ],
        dtype=object,
    )
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
