"""The confusion matrix of a classifier."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.figures import style
from tstlens.training import Evaluation


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
