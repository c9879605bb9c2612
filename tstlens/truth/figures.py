"""Planted series, scores of what was found in them, and methods against known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.truth.scores import TITLES, FeatureScore, StateScore, TruthTable, WhereScore
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
    figure = make_subplots(rows=n_channels, cols=1, shared_xaxes=True, vertical_spacing=0.03)
    for channel, (values, decides) in enumerate(zip(series, mask, strict=True)):
        place: dict[str, Any] = {"row": channel + 1, "col": 1, "showlegend": channel == 0}
        said = f"channel {channel}, sample %{{x}}: %{{y:.2f}}"
        for name, drawn, color, width in (
            ("background", values, style.FAINT, 1.5),
            ("decides", np.where(decides, values, np.nan), style.BLUE, 2.5),
        ):
            options = {"name": name, "legendgroup": name, "said": said, **place}
            marks.curve(figure, np.arange(n_time), drawn, color, width, **options)
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
    """
    scored = np.flatnonzero(~np.isnan(result.auprc))
    series = scored[np.argsort(-result.auprc[scored], kind="stable")]
    rank = 100 * (np.arange(len(series)) + 0.5) / max(1, len(series))
    random: dict[str, Any] = {"name": "random order", "said": "random order: %{y:.3f}"}
    found: dict[str, Any] = {"name": "attribution", "customdata": series}
    found["said"] = "series %{customdata}: %{y:.3f}"
    figure = go.Figure()
    marks.curve(figure, rank, result.random[series], style.MUTED, 1.5, **random)
    marks.curve(figure, rank, result.auprc[series], style.BLUE, 2.5, **found)
    figure.update_xaxes(title={"text": "series, best first (%)"}, zeroline=False)
    figure.update_yaxes(title={"text": "AUPRC"}, range=[-0.02, 1.02], zeroline=False)
    interval = "" if np.isnan(result.low) else f" [{result.low:.3f}, {result.high:.3f}]"
    heading = f"AUPRC {result.mean:.3f}{interval}" if title == "" else title
    subtitle = (
        f"{result.n_scored} series, {result.unit}; random order "
        f"{np.nanmean(result.random):.3f}; {100 * result.level:.0f} % interval over series"
    )
    return style.finish(figure, heading, subtitle, plot_height=240, above=34, below=50, left=52)


@draw.register
def draw_states(result: StateScore, *, title: str | None = "") -> go.Figure:
    """Precision of every code, as wide as it is frequent, beside shuffled codes.

    Args:
        result: of :func:`tstlens.truth.score_states`.
        title: "" for one with the mutual information, None for none.
    """
    order = np.argsort(-result.precision, kind="stable")
    width = 100 * result.support[order] / result.n
    hover = [
        f"<b>code {result.codes[i]}</b> for state {result.stands_for[i]}<br>precision "
        f"{result.precision[i]:.3f}, recall {result.recall[i]:.3f}<br>{result.support[i]} positions"
        for i in order
    ]
    edge = {"line": {"color": style.PAPER, "width": 0.5}}
    place = {"x": np.cumsum(width) - width, "width": width, "offset": 0}
    figure = _bars(result.precision[order], hover, result.shuffled_purity, edge, **place)
    figure.update_xaxes(title={"text": "positions, by code (%)"}, range=[0, 100])
    figure.update_yaxes(title={"text": "precision"})
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
    """
    size = np.abs(result.correlation)
    order = np.argsort(-size, kind="stable")
    hover = [
        f"<b>feature {i}</b>, latent {result.latent[i]}<br>r = {result.correlation[i]:.3f}"
        if result.latent[i] >= 0
        else f"<b>feature {i}</b>, no latent left"
        for i in order
    ]
    figure = _bars(size[order], hover, result.shuffled_mcc, {}, x=np.arange(len(order)))
    figure.update_xaxes(tickvals=[], title={"text": "planted features, best first"})
    figure.update_yaxes(title={"text": "|r| with its latent"})
    heading = f"Mean correlation {result.mcc:.3f}" if title == "" else title
    subtitle = (
        f"{len(size)} features, {result.n_latents} latents; shuffled rows "
        f"{result.shuffled_mcc:.3f} (dotted)"
    )
    return style.finish(figure, heading, subtitle, plot_height=220, below=40, left=52)


def _bars(
    heights: np.ndarray, said: list[str], control: float, look: dict[str, Any], **place: Any
) -> go.Figure:
    """Upright bars of shares, and a dotted line at what shuffled rows reach."""
    options = {"marker": {"color": style.BLUE, **look}, "showlegend": False}
    figure = go.Figure(go.Bar(y=heights, **place, **options, **marks.hovered(said)))
    figure.add_hline(y=control, line=_CONTROL)
    return figure.update_yaxes(range=[0, 1.02])


@draw.register
def draw_next_patch(result: NextPatchScore, *, title: str | None = "") -> go.Figure:
    """Valid-transition mass by position: the model between chance and the best possible.

    Args:
        result: of :func:`tstlens.truth.score_next_patch`.
        title: "" for one with the means, None for none.
    """
    figure = go.Figure()
    for name, values, color, width, dash in (
        ("best possible", result.best, style.INK, 1.5, "dash"),
        ("patch alone", result.patch_only, style.MUTED, 1.5, None),
        ("model", result.valid_mass, style.BLUE, 2.5, None),
    ):
        said = f"{name}, pos %{{x}}: %{{y:.3f}}"
        pos = np.arange(len(values))
        marks.curve(figure, pos, values, color, width, name=name, said=said, dash=dash)
    figure.add_hline(y=result.chance, line=_CONTROL)
    figure.update_xaxes(title={"text": "position"}, zeroline=False)
    figure.update_yaxes(title={"text": "valid mass"}, range=[0, 1.04], zeroline=False)
    heading = f"Valid-transition mass {result.valid_mass.mean():.3f}" if title == "" else title
    subtitle = (
        f"best {result.best.mean():.3f}, patch alone {result.patch_only.mean():.3f}, chance "
        f"{result.chance:.3f} (dotted); {result.n_series} series"
    )
    return style.finish(figure, heading, subtitle, plot_height=240, above=34, below=50, left=52)


_KINDS = {  # of rows -> colour, and name in the legend
    "method": (style.BLUE, "method"),
    "trivial": (style.ORANGE, "trivial control"),
    "random": (style.MUTED, "random control"),
    "answer": (style.INK, "the answer itself"),
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
    summary = result.summary(task)
    rows = [method for method in result.methods if method in set(summary["method"])][::-1]
    panels: dict[str, Any] = {"rows": 1, "cols": len(result.measures), "horizontal_spacing": 0.04}
    figure = make_subplots(shared_yaxes=True, **panels)
    for column, measure in enumerate(result.measures, start=1):
        place: dict[str, Any] = {"row": 1, "col": column}
        for kind, (colour, name) in _KINDS.items():
            part = summary[(summary["measure"] == measure) & (summary["kind"] == kind)]
            if not len(part):
                continue
            seeds = [
                (value, method)
                for method in part["method"]
                for value in result.values(method, measure, task)
            ]
            faint = {"look": {"opacity": 0.35}, **place}
            x, y = zip(*seeds, strict=True)
            marks.dots(figure, x, y, colour, 5, **faint)
            mean, low, high = (np.asarray(part[name], float) for name in ("mean", "low", "high"))
            low, high = np.where(np.isnan(low), mean, low), np.where(np.isnan(high), mean, high)
            marks.dots(
                figure,
                mean,
                part["method"],
                colour,
                8,
                name=name,
                said="<b>%{y}</b><br>%{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], "
                "%{customdata[2]} seeds",
                customdata=np.stack([low, high, part["n_seeds"]], 1),
                error_x=marks.whiskers(mean, low, high, colour, 1.5),
                legendgroup=kind,
                showlegend=column == 1,
                **place,
            )
        figure.update_xaxes(title={"text": measure}, nticks=4, **place)
    figure.update_yaxes(categoryorder="array", categoryarray=rows, zeroline=False)
    heading = TITLES.get(result.question, result.question) if title == "" else title
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
