"""What forcing or banning codes did, by number of positions, beside random codes."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from tstlens.codebooks.effects_result import CodeEffects
from tstlens.figures import style
from tstlens.figures.drawing import draw
from tstlens.figures.words import number


@draw.register
def draw_code_effects(result: CodeEffects, *, title: str | None = "") -> go.Figure:
    """Mean effect with its 95 % interval over series, in front of every control's mean.

    What can mislead: the interval is of the mean over series, for these codes; where the line lies
    among the grey ones is what tells them from random codes.

    Args:
        result: of :func:`tstlens.codebooks.effects`.
        title: "" for one made from the result, None for none.

    Returns:
        A plotly figure.
    """
    effect, controls = result.effect(), result.control_effects().mean(2)  # [control, dose]
    x = np.arange(len(result.doses), dtype=float)
    ticks = [str(dose) for dose in result.doses]
    half = 1.96 * effect.std(1, ddof=1) / np.sqrt(effect.shape[1]) if effect.shape[1] > 1 else None
    table = result.summary()
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": style.FAINT, "width": 1.5})
    for at, control in enumerate(controls):
        figure.add_scatter(
            x=x,
            y=control,
            mode="lines+markers",
            marker={"size": 4},
            line={"color": style.FAINT, "width": 1},
            name=f"{len(controls)} random codes as frequent",
            legendgroup="controls",
            showlegend=at == 0,
            hovertemplate=(
                f"<b>{_said(result.control_codes[at])}</b><br>active at "
                f"{100 * float(result.control_frequency[at]):.1f} % of places<br>"
                "%{y:+.3f}<extra></extra>"
            ),
        )
    figure.add_scatter(
        x=x,
        y=controls.mean(0),
        mode="lines",
        line={"color": style.MUTED, "width": 2, "dash": "dot"},
        name="their mean",
        hovertemplate="mean of the random codes<br>%{y:+.3f}<extra></extra>",
    )
    hover = [
        f"<b>{_said(result.codes)}</b><br>{row['dose']} positions: {number(row['effect'], True)}"
        f"<br>random codes: {number(row['control'], True)}<br>d {number(row['d'])}, p over "
        f"series {number(row['p_series'])}, among codes {number(row['p_codes'])}"
        for row in table.to_dict(orient="records")
    ]
    interval = {"type": "data", "array": half, "color": style.BLUE, "thickness": 2, "width": 0}
    figure.add_scatter(
        x=x,
        y=effect.mean(1),
        mode="lines+markers",
        marker={"size": 8, "color": style.BLUE},
        line={"color": style.BLUE, "width": 2.5},
        error_y=None if half is None else interval,
        name=_said(result.codes),
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
    done = {"force": "forced", "ban": "banned"}[result.action]
    figure.update_xaxes(
        title={"text": f"positions at which codes are {done}"},
        tickmode="array",
        tickvals=x,
        ticktext=ticks,
        range=[-0.25, len(x) - 0.75],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(zeroline=False, nticks=6, tickformat=".2~g")
    above = style.label_above(figure, f"change of {result.measure}")
    figure.update_layout(
        legend={
            "orientation": "h",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "x": 0,
            "font": {"size": 11, "color": style.MUTED},
        }
    )
    n_series = effect.shape[1]
    heading = f"C{_said(result.codes)[1:]} {done}" if title == "" else title
    subtitle = f"{n_series} series; line: 95 % interval over series"
    return style.finish(
        figure, heading, subtitle, plot_height=240, above=above + 4, below=104, left=52
    )


def _said(codes: dict[str, dict[int, list[int]]]) -> str:
    """Codes in words, short enough for a legend."""
    parts = []
    for hook, groups in codes.items():
        for group, wanted in groups.items():
            which = ", ".join(str(code) for code in wanted[:3]) + ("…" if len(wanted) > 3 else "")
            several = len(groups) > 1 or group > 0
            place = f" of group {group}" if several else ""
            plural = "s" if len(wanted) > 1 else ""
            parts.append(f"code{plural} {which}{place} at {hook.replace('blocks.', 'L', 1)}")
    shown = "; ".join(parts[:2])
    return f"{shown} and {len(parts) - 2} more" if len(parts) > 2 else shown
