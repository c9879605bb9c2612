"""Planted tasks and the scores of methods that look for what was planted.

Methods against known answers: a dot and an interval per method, a panel per measure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.truth.scores import FeatureScore, StateScore, TruthTable, WhereScore
from tstlens.truth.tasks import PlantedTask
from tstlens.truth.training import NextPatchScore

_CONTROL = {"color": style.ORANGE, "width": 1.5, "dash": "dot"}  # shows on bars, too


@checked
def planted_series(task: PlantedTask, index: int = 0, *, title: str | None = "") -> go.Figure:
    """One series of a planted task, the samples that decide its class in blue.

    Args:
        task: of :func:`tstlens.truth.planted`.
        index: which series.
        title: "" for one with task and class, None for none.

    Returns:
        A plotly figure, one row per channel.

    Raises:
        ArgumentError: no series of this index.

    Example:
        >>> from tstlens.truth import planted
        >>> len(planted_series(planted("low-var", n_train=4)).data)
        4
    """
    if not 0 <= index < len(task):
        raise ArgumentError(f"index: expected 0..{len(task) - 1}, got {index}")
    series, mask = task.series[index].cpu().numpy(), task.mask[index].cpu().numpy()
    n_channels, n_time = series.shape
    time = np.arange(n_time)
    figure = make_subplots(rows=n_channels, cols=1, shared_xaxes=True, vertical_spacing=0.03)
    for channel, (values, decides) in enumerate(zip(series, mask, strict=True)):
        for name, drawn, line in (
            ("background", values, {"color": style.FAINT, "width": 1.5}),
            ("decides", np.where(decides, values, np.nan), {"color": style.BLUE, "width": 2.5}),
        ):
            figure.add_scatter(
                x=time,
                y=drawn,
                mode="lines",
                line=line,
                name=name,
                legendgroup=name,
                showlegend=channel == 0,
                hovertemplate=f"channel {channel}, sample %{{x}}: %{{y:.2f}}<extra></extra>",
                row=channel + 1,
                col=1,
            )
        label = "value (SD)" if n_channels == 1 else f"ch {channel}"
        figure.update_yaxes(title={"text": label}, zeroline=False, row=channel + 1, col=1)
    figure.update_xaxes(title={"text": "sample"}, row=n_channels, col=1)
    heading = f"{task.name}: {task.class_names[int(task.labels[index])]}"
    return style.finish(
        figure,
        heading if title == "" else title,
        f"series {index}, {task.split} split; values in SD of the background",
        plot_height=max(160, 84 * n_channels),
        above=34,
        below=48,
        left=54,
    )


@draw.register
def draw_where(result: WhereScore, *, title: str | None = "") -> go.Figure:
    """AUPRC of every series in order, beside random order.

    Args:
        result: of :func:`tstlens.truth.score_where`.
        title: "" for one with the mean and its interval, None for none.

    Returns:
        A plotly figure.
    """
    scored = ~np.isnan(result.auprc)
    order = np.argsort(-result.auprc[scored], kind="stable")
    rank = 100 * (np.arange(len(order)) + 0.5) / max(1, len(order))
    series = np.flatnonzero(scored)[order]
    figure = go.Figure()
    figure.add_scatter(
        x=rank,
        y=result.random[scored][order],
        mode="lines",
        line={"color": style.MUTED, "width": 1.5},
        name="random order",
        hovertemplate="random order: %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=rank,
        y=result.auprc[scored][order],
        mode="lines",
        line={"color": style.BLUE, "width": 2.5},
        name="attribution",
        customdata=series,
        hovertemplate="series %{customdata}: %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title={"text": "series, best first (%)"}, zeroline=False)
    figure.update_yaxes(title={"text": "AUPRC"}, range=[-0.02, 1.02], zeroline=False)
    interval = "" if np.isnan(result.low) else f" [{result.low:.3f}, {result.high:.3f}]"
    heading = f"AUPRC {result.mean:.3f}{interval}"
    subtitle = (
        f"{result.n_scored} series, {result.unit}; random order "
        f"{np.nanmean(result.random):.3f}; {100 * result.level:.0f} % interval over series"
    )
    heading = heading if title == "" else title
    return style.finish(figure, heading, subtitle, plot_height=240, above=34, below=50, left=52)


@draw.register
def draw_states(result: StateScore, *, title: str | None = "") -> go.Figure:
    """Precision of every code, as wide as it is frequent, beside shuffled codes.

    Args:
        result: of :func:`tstlens.truth.score_states`.
        title: "" for one with the mutual information, None for none.

    Returns:
        A plotly figure.
    """
    order = np.argsort(-result.precision, kind="stable")
    width = 100 * result.support[order] / result.n
    start = np.concatenate([[0.0], np.cumsum(width)[:-1]])
    hover = [
        f"<b>code {result.codes[i]}</b> for state {result.stands_for[i]}<br>precision "
        f"{result.precision[i]:.3f}, recall {result.recall[i]:.3f}<br>{result.support[i]} positions"
        for i in order
    ]
    figure = go.Figure()
    figure.add_bar(
        x=start,
        y=result.precision[order],
        width=width,
        offset=0,
        marker={"color": style.BLUE, "line": {"color": style.PAPER, "width": 0.5}},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    figure.add_hline(y=result.shuffled_purity, line=_CONTROL)
    figure.update_xaxes(title={"text": "positions, by code (%)"}, range=[0, 100])
    figure.update_yaxes(title={"text": "precision"}, range=[0, 1.02])
    heading = f"NMI {result.nmi:.3f}, purity {result.purity:.3f}" if title == "" else title
    subtitle = (
        f"{len(result.codes)} codes, {result.n} positions; shuffled: NMI "
        f"{result.shuffled_nmi:.3f}, purity {result.shuffled_purity:.3f} (dotted)"
    )
    return style.finish(figure, heading, subtitle, plot_height=220, below=50, left=52)


@draw.register
def draw_feature_score(result: FeatureScore, *, title: str | None = "") -> go.Figure:
    """Correlation of every planted feature with its latent, strongest first.

    Args:
        result: of :func:`tstlens.truth.score_features`.
        title: "" for one with the mean, None for none.

    Returns:
        A plotly figure.
    """
    size = np.abs(result.correlation)
    order = np.argsort(-size, kind="stable")
    hover = [
        f"<b>feature {i}</b>, latent {result.latent[i]}<br>r = {result.correlation[i]:.3f}"
        if result.latent[i] >= 0
        else f"<b>feature {i}</b>, no latent left"
        for i in order
    ]
    figure = go.Figure()
    figure.add_bar(
        x=np.arange(len(order)),
        y=size[order],
        marker={"color": style.BLUE},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    figure.add_hline(y=result.shuffled_mcc, line=_CONTROL)
    ticks = {"tickvals": [], "title": {"text": "planted features, best first"}}
    figure.update_xaxes(**ticks)
    figure.update_yaxes(title={"text": "|r| with its latent"}, range=[0, 1.02])
    heading = f"Mean correlation {result.mcc:.3f}" if title == "" else title
    subtitle = (
        f"{len(size)} features, {result.n_latents} latents; shuffled rows "
        f"{result.shuffled_mcc:.3f} (dotted)"
    )
    return style.finish(figure, heading, subtitle, plot_height=220, below=40, left=52)


@draw.register
def draw_next_patch(result: NextPatchScore, *, title: str | None = "") -> go.Figure:
    """Valid-transition mass by position: the model between chance and the best possible.

    Args:
        result: of :func:`tstlens.truth.score_next_patch`.
        title: "" for one with the means, None for none.

    Returns:
        A plotly figure.
    """
    pos = np.arange(len(result.valid_mass))
    curves = (
        ("best possible", result.best, {"color": style.INK, "width": 1.5, "dash": "dash"}),
        ("patch alone", result.patch_only, {"color": style.MUTED, "width": 1.5}),
        ("model", result.valid_mass, {"color": style.BLUE, "width": 2.5}),
    )
    figure = go.Figure()
    for name, values, line in curves:
        figure.add_scatter(
            x=pos,
            y=values,
            mode="lines",
            line=line,
            name=name,
            hovertemplate=f"{name}, pos %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    figure.add_hline(y=result.chance, line=_CONTROL)
    figure.update_xaxes(title={"text": "position"}, zeroline=False)
    figure.update_yaxes(title={"text": "valid mass"}, range=[0, 1.04], zeroline=False)
    heading = f"Valid-transition mass {result.valid_mass.mean():.3f}" if title == "" else title
    subtitle = (
        f"best {result.best.mean():.3f}, patch alone {result.patch_only.mean():.3f}, chance "
        f"{result.chance:.3f} (dotted); {result.n_series} series"
    )
    return style.finish(figure, heading, subtitle, plot_height=240, above=34, below=50, left=52)


_COLOURS = {
    "method": style.BLUE,
    "trivial": style.ORANGE,
    "random": style.MUTED,
    "answer": style.INK,
}
_NAMES = {
    "method": "method",
    "trivial": "trivial control",
    "random": "random control",
    "answer": "the answer itself",
}
_ASKED = {
    "where": "Which samples decide?",
    "component": "Which component does it?",
    "feature": "Which feature is there?",
    "state": "Which state is it in?",
    "coverage": "Do intervals cover?",
}
_ROW = 22  # pixels of a method


@draw.register
@checked
def draw_truth(result: TruthTable, *, task: str | None = None, title: str | None = "") -> go.Figure:
    """Every method's score with its interval over seeds, and the single seeds as faint dots.

    Args:
        result: a table of :func:`tstlens.truth.truth`.
        task: one of its tasks; None for the mean over all.
        title: "" for the question, None for none.

    Returns:
        A plotly figure, one panel per measure.
    """
    measures = result.measures
    summary = result.summary(task)
    rows = [method for method in result.methods if method in set(summary["method"])][::-1]
    figure = make_subplots(rows=1, cols=len(measures), shared_yaxes=True, horizontal_spacing=0.04)
    for column, measure in enumerate(measures, start=1):
        for kind, colour in _COLOURS.items():
            part = summary[(summary["measure"] == measure) & (summary["kind"] == kind)]
            if not len(part):
                continue
            shared: dict[str, Any] = {"legendgroup": kind, "name": _NAMES[kind]}
            _seeds(figure, result, list(part["method"]), measure, task, colour, column)
            mean, low, high = (np.asarray(part[name], float) for name in ("mean", "low", "high"))
            low, high = np.where(np.isnan(low), mean, low), np.where(np.isnan(high), mean, high)
            figure.add_scatter(
                x=mean,
                y=part["method"],
                mode="markers",
                marker={"color": colour, "size": 8},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": high - mean,
                    "arrayminus": mean - low,
                    "color": colour,
                    "thickness": 1.5,
                    "width": 0,
                },
                customdata=np.stack([low, high, part["n_seeds"]], 1),
                hovertemplate="<b>%{y}</b><br>%{x:.3f} [%{customdata[0]:.3f}, "
                "%{customdata[1]:.3f}], %{customdata[2]} seeds<extra></extra>",
                showlegend=column == 1,
                row=1,
                col=column,
                **shared,
            )
        figure.update_xaxes(title={"text": measure}, nticks=4, row=1, col=column)
    figure.update_yaxes(categoryorder="array", categoryarray=rows, zeroline=False)
    heading = _ASKED.get(result.question, result.question) if title == "" else title
    seeds = len({score.seed for score in result.scores})
    of_tasks = task or f"mean over {len(result.tasks)} tasks"
    level = "one seed"
    if seeds > 1:
        level = f"{100 * result.level:.0f} % interval over {seeds} seeds; faint: single seeds"
    return style.finish(
        figure,
        heading,
        f"{of_tasks}; {level}",
        plot_height=_ROW * len(rows) + 10,
        above=30,
        below=50,
        left=style.room_for(rows),
    )


def _seeds(
    figure: go.Figure,
    result: TruthTable,
    methods: list[str],
    measure: str,
    task: str | None,
    colour: str,
    column: int,
) -> None:
    points = [
        (value, method) for method in methods for value in result.values(method, measure, task)
    ]
    values, names = zip(*points, strict=True)
    figure.add_scatter(
        x=values,
        y=names,
        mode="markers",
        marker={"color": colour, "size": 5, "opacity": 0.35},
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=column,
    )
