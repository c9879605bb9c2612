"""Exact effects against estimated ones."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.words import number, quantity, site_label, site_title
from tstlens.patching import Agreement
from tstlens.stats import mean_known

MOST_HOVERED = 4000  # dots that carry their site's name


@draw.register
@checked
def draw_agreement(
    result: Agreement, *, pair: int | None = None, title: str | None = ""
) -> go.Figure:
    """A dot for every pair and site, exact effect across and estimate upward; the line is y = x.

    What can mislead: dots lie over each other near zero, where most sites are; the correlations
    under the title are means over pairs, not of this cloud.

    Args:
        result: of :func:`tstlens.patching.agreement`.
        pair: show this pair only; None for all.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: no such pair.
    """
    n_pairs = len(result.exact)
    if pair is not None and not -n_pairs <= pair < n_pairs:
        raise ArgumentError(f"expected pair in 0..{n_pairs - 1}, got {pair}")
    rows = range(n_pairs) if pair is None else [pair % n_pairs]
    exact, guess = (part[list(rows)].numpy() for part in (result.exact, result.approximate))
    ends = np.array([min(exact.min(), guess.min(), 0.0), max(exact.max(), guess.max(), 0.0)])
    ends += np.array([-0.04, 0.04]) * max(float(np.ptp(ends)), 1e-12)
    figure = go.Figure()
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": style.FAINT, "width": 1.5},
        hoverinfo="skip",
        showlegend=False,
    )
    labels = [site_label(site) for site in result.sites]
    hover = [
        f"<b>{label}</b>, pair {row}<br>exact {number(float(x), signed=True)}<br>"
        f"estimate {number(float(y), signed=True)}"
        for row, xs, ys in zip(rows, exact, guess, strict=True)
        for label, x, y in zip(labels, xs, ys, strict=True)
    ]
    many = exact.size > MOST_HOVERED
    # WebGL only where there are many: not every browser has it.
    draw_dots = figure.add_scattergl if many else figure.add_scatter
    draw_dots(
        x=exact.ravel(),
        y=guess.ravel(),
        mode="markers",
        marker={
            "size": 5 if exact.size > 500 else 7,
            "color": style.BLUE,
            "opacity": 0.35 if exact.size > 500 else 0.6,
        },
        hovertext=None if many else hover,
        hovertemplate=None if many else "%{hovertext}<extra></extra>",
        showlegend=False,
    )
    unit = quantity(result.metric, result.unit, "effect")
    figure.update_xaxes(title={"text": f"exact {unit}"}, range=ends, nticks=6)
    figure.update_yaxes(range=ends, nticks=6)
    above = style.label_above(figure, f"estimated {unit}")
    heading = f"Estimated against exact: {site_title(result.site)}" if title == "" else title
    which = f"pair {pair}" if pair is not None else f"{n_pairs} pairs" if n_pairs > 1 else "1 pair"
    means = [
        number(mean_known(part[list(rows)]))
        for part in (result.pearson, result.spearman, result.sign_agreement)
    ]
    subtitle = (
        f"{which} × {len(labels)} sites; mean Pearson {means[0]}, Spearman {means[1]}, same sign "
        f"{means[2]}"
    )
    return style.finish(figure, heading, subtitle, plot_height=340, above=above, left=56)
