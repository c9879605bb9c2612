"""How a training or a fit went: its measures over epochs or steps, a panel for each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.words import number
from tstlens.training import TrainingResult

_PANEL = 120  # pixels
_GAP = 46


def histories(
    rows: Sequence[Mapping[str, Any]],
    panels: Mapping[str, Mapping[str, str]],
    along: str,
    title: str | None,
    subtitle: str = "",
    *,
    marked: Mapping[str, float] | None = None,
) -> go.Figure:
    """Measures over epochs or steps, a panel for each kind of them.

    Args:
        rows: one per epoch or step.
        panels: heading of a panel -> what to draw there: column -> its name in the legend. A
            column without a number is left out, and a panel without one too.
        along: the column of epochs or steps.
        title: of the figure.
        subtitle: a second line.
        marked: places on the horizontal axis with a line, by name.

    Raises:
        ArgumentError: no rows.
    """
    if not rows:
        raise ArgumentError("this history is empty, so there is nothing to draw")
    known = {
        heading: {
            column: name
            for column, name in columns.items()
            if any(row.get(column) is not None for row in rows)
        }
        for heading, columns in panels.items()
    }
    known = {heading: columns for heading, columns in known.items() if columns}
    height = len(known) * _PANEL + (len(known) - 1) * _GAP
    figure = make_subplots(
        rows=len(known),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=_GAP / height if len(known) > 1 else 0,
        subplot_titles=list(known),
    )
    x = [row[along] for row in rows]
    colors = (style.BLUE, style.ORANGE, style.MUTED, *style.LINES)
    named: set[str] = set()
    for at, (heading, columns) in enumerate(known.items(), start=1):
        place: dict[str, Any] = {"row": at, "col": 1}
        for color, (column, name) in zip(colors, columns.items(), strict=False):
            y = [np.nan if row.get(column) is None else float(row[column]) for row in rows]
            said = [
                f"{along} {one}<br>{name} {heading}: {number(z)}"
                for one, z in zip(x, y, strict=True)
            ]
            dots = 5 if len(x) <= 30 else None
            legend = name if len(columns) > 1 and name not in named else None
            named |= {name} if len(columns) > 1 else set()
            marks.curve(figure, x, y, color, 1.8, name=legend, said=said, dots=dots, **place)
        figure.update_yaxes(zeroline=False, nticks=5, rangemode="tozero", **place)
    marks.headings_left(figure)
    for name, at in (marked or {}).items():
        line: Any = {"color": style.MUTED, "width": 1, "dash": "dot"}
        figure.add_vline(x=at, line=line)
        figure.add_annotation(
            text=name,
            showarrow=False,
            font={"size": 10, "color": style.MUTED},
            **{"x": at, "xref": "x", "y": 1, "yref": "paper", "yanchor": "bottom"},
        )
    whole = {"tickmode": "array", "tickvals": x} if len(x) <= 12 else {}
    figure.update_xaxes(zeroline=False, **whole)
    figure.update_xaxes(title={"text": along}, row=len(known), col=1)
    below = 52 + (24 if named else 0)
    style.finish(figure, title, subtitle, plot_height=height, above=24, below=below, left=58)
    return marks.legend_below(figure, 50, height) if named else figure


@draw.register
@checked
def draw_training(
    result: TrainingResult, *, phase: str | None = None, title: str | None = ""
) -> go.Figure:
    """Loss, accuracy and learning rate over the epochs, of the training part and of validation.

    What can mislead: the training part is measured while it is augmented and dropped out, so its
    loss may lie above validation's.

    Args:
        phase: "fit" or "refit"; None for the fit, whose validation chose the epoch.

    Raises:
        ArgumentError: the run had no such phase.
    """
    rows = [row for row in result.history if row["phase"] == (phase or "fit")]
    if not rows:
        phases = sorted({row["phase"] for row in result.history})
        raise ArgumentError(f"expected phase in {phases}, got {phase!r}")
    both = {"train": "training", "val": "validation"}
    panels = {
        "loss (nats)": {f"{part}_loss": name for part, name in both.items()},
        "accuracy": {f"{part}_accuracy": name for part, name in both.items()},
        "error (squared units)": {f"{part}_mse": name for part, name in both.items()},
        "learning rate": {"lr": "learning rate"},
    }
    last = rows[-1]
    found = [f"{len(rows)} epochs"]
    if last.get("val_accuracy") is not None:
        best = max(rows, key=lambda row: row["val_accuracy"])
        found.append(f"validation accuracy at best {number(best['val_accuracy'])}")
    chosen = {"chosen": float(result.best_epoch)} if rows[0]["phase"] == "fit" else {}
    heading = "Training" if title == "" else title
    return histories(rows, panels, "epoch", heading, ", ".join(found), marked=chosen)
