"""Methods against known answers: a dot and an interval per method, a panel per measure."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import checked
from tstlens.data.planted import TruthTable
from tstlens.figures import style
from tstlens.figures.drawing import draw

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
        result: a table of :func:`tstlens.report.truth`.
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
