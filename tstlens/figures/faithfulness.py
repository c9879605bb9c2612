"""How much of the model's behaviour the strongest edges keep, beside random ones."""

from __future__ import annotations

import plotly.graph_objects as go

from tstlens.arguments import checked
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.patching.circuits import Faithfulness


@draw.register
@checked
def draw_faithfulness(result: Faithfulness, *, title: str | None = "") -> go.Figure:
    """Faithfulness against the share of edges kept, beside random orders of edges.

    Args:
        result: of :meth:`Circuit.faithfulness`.
        title: "" for one with CPR and CMD, None for none.

    Returns:
        A plotly figure.

    Example:
        >>> import torch
        >>> zeros, ones = torch.zeros(1), torch.ones(1)
        >>> result = Faithfulness(torch.tensor([[0.0, 0.8, 1.0]]), (0.01, 0.1, 1.0), (1, 10, 100),
        ...     zeros, ones, torch.tensor([0.6]), 5, torch.zeros(0, 1, 3), "logit", "logit")
        >>> draw_faithfulness(result).layout.xaxis.type
        'log'
    """
    percent = [100 * share for share in result.fractions]
    figure = go.Figure()
    figure.add_hline(y=1, line={"color": style.FAINT, "width": 1.5, "dash": "dot"})
    figure.add_hline(y=0, line={"color": style.FAINT, "width": 1.5})
    if len(result.random):
        curves = result.random_curves.double().cpu().numpy()
        for curve in curves:
            figure.add_scatter(
                x=percent,
                y=curve,
                mode="lines",
                line={"color": style.FAINT, "width": 1},
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=percent,
            y=curves.mean(0),
            mode="lines",
            name=f"random edges ({len(curves)} orders)",
            line={"color": style.MUTED, "width": 2},
            hovertemplate="%{x:.3g} % of edges at random<br>%{y:.3f}<extra></extra>",
        )
    curve = result.curve.double().cpu().numpy()
    hover = [
        f"<b>{share:.3g} % of edges ({count})</b><br>faithfulness {value:.3f}"
        for share, count, value in zip(percent, result.n_edges, curve, strict=True)
    ]
    figure.add_scatter(
        x=percent,
        y=curve,
        mode="lines+markers",
        name="strongest edges",
        line={"color": style.BLUE, "width": 2.5},
        marker={"size": 6},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
    n_all = max(1, round(max(result.n_edges) / max(result.fractions)))
    if result.n_circuit:
        figure.add_scatter(
            x=[100 * result.n_circuit / n_all],
            y=[result.of_circuit],
            mode="markers",
            name=f"the circuit ({result.n_circuit} edges)",
            marker={"size": 11, "symbol": "diamond", "color": style.ORANGE},
            hovertemplate="the circuit: %{x:.3g} % of edges<br>%{y:.3f}<extra></extra>",
        )
    figure.update_xaxes(
        type="log",
        title={"text": "edges kept (%)"},
        tickvals=[0.1, 1, 10, 100],
        zeroline=False,
    )
    figure.update_yaxes(title={"text": "faithfulness"}, zeroline=False)
    heading = f"Faithfulness: CPR {result.cpr:.2f}, CMD {result.cmd:.2f}" if title == "" else title
    subtitle = f"{len(result.values)} pairs; {result.metric}"
    if len(result.random):
        subtitle += f"; random edges: CPR {result.random_cpr:.2f}, CMD {result.random_cmd:.2f}"
    return style.finish(figure, heading, subtitle, plot_height=260, above=62, below=52, left=52)
