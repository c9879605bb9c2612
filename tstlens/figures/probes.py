"""Linear probes: scores by layer, head and position, beside what shuffled targets give."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import UnknownNameError
from tstlens.figures import style
from tstlens.figures.attribution import title_at_edge
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.words import number, site_title, when
from tstlens.probing.extraction import layer_of
from tstlens.probing.probes_result import ProbeResult

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
