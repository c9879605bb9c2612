"""How good codebooks are, and what a search, a comparison or an index of codes holds.

What forcing or banning codes did, by number of positions, beside random codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.codebooks.book import CodeWindows, Named
from tstlens.codebooks.code_effects import CodeEffects
from tstlens.codebooks.comparing import ChangedCodes, CommonCodes, SimilarCodes
from tstlens.codebooks.fitting import FittedCodebooks
from tstlens.codebooks.index import CodeIndex
from tstlens.codebooks.scores import CodebookScores
from tstlens.codebooks.search import CodeSearch
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.histories import histories
from tstlens.figures.words import number


@draw.register
def draw_fit(result: FittedCodebooks, *, title: str | None = "") -> go.Figure:
    """Error, loss of the task, codes without use and their perplexity over the epochs of a fit."""
    panels = {
        "squared error, share of the variance": {
            "reconstruction": "reconstruction",
            "commitment": "commitment",
        },
        "loss of the task": {"task": "task"},
        "codes": {"dead": "never used", "revived": "revived"},
        "perplexity (codes in use)": {"perplexity": "perplexity"},
    }
    n_codes = sum(book.cfg.n_codes for book in result.values())
    hooks = f"{len(result)} hook point{'s' if len(result) > 1 else ''}"
    heading = "Fit of codebooks" if title == "" else title
    subtitle = f"{n_codes} codes at {hooks}"
    return histories(result.history, panels, "epoch", heading, subtitle)


_ROWS = {"codebooks": style.BLUE, "SAEs": style.ORANGE}
MOST_CHANNELS = 12


@draw.register
def draw_codebook_scores(result: CodebookScores, *, title: str | None = "") -> go.Figure:
    """The task through the codebooks and beside other dictionaries, and the variance explained.

    Where random tables do as well as fitted ones, the task does not need these activations.
    """
    rows = list(result.task)
    measures = list(result.task["codebooks"])
    hooks = [book.hook for book in result.books["codebooks"]]
    headings = [*[one.replace("_", " ") for one in measures]]
    headings += [f"explained variance at {_short(hook)}" for hook in hooks]
    figure = make_subplots(
        rows=len(headings), cols=1, subplot_titles=headings, vertical_spacing=0.32 / len(headings)
    )
    for at, heading in enumerate(headings, start=1):
        if at <= len(measures):
            values = {row: task[measures[at - 1]] for row, task in result.task.items()}
        else:
            which = at - len(measures) - 1
            values = {
                row: found[which].explained_variance for row, found in result.books.items() if found
            }
        names = [row for row in rows if row in values]
        shown = [values[row] for row in names]
        colors = [_ROWS.get(row, "#a3adb8") for row in names]
        explained = at > len(measures)
        more = {"constraintext": "none"}
        drawn = marks.measured(figure, names, shown, heading, colors, explained, at, **more)
        if at > len(measures) or measures[at - 1] == "accuracy":
            figure.update_xaxes(range=[min(0.0, *drawn), 1.02], row=at, col=1)
    figure.update_annotations(x=0, xanchor="left", font={"size": 11, "color": style.MUTED})
    used = result.books["codebooks"]
    dead = sum(book.dead for book in used)
    codes = sum(book.n_codes for book in used)
    subtitle = (
        f"{result.data}, {result.n_series} series; {codes - dead} of {codes} codes used, "
        f"{', '.join(f'{book.bits:.0f}' for book in used)} bits per position"
    )
    heading = "The model through its codebooks" if title == "" else title
    height = sum(34 + 21 * (len(rows) if at < len(measures) else len(result.books))
                 for at in range(len(headings)))  # fmt: skip
    left = style.room_for(rows) + 4
    return style.finish(figure, heading, subtitle, plot_height=height, above=22, left=left)


@draw.register
def draw_code_search(result: CodeSearch, *, n: int = 10, title: str | None = "") -> go.Figure:
    """Precision of each found code on the other split, beside its rivals and chance.

    Args:
        n: codes.

    Raises:
        ArgumentError: nothing was found.
    """
    codes = result.codes[:n]
    if not codes:
        raise ArgumentError(f"the search for {result.asked} found no code, so nothing to draw")
    names = [f"{_short_code((one.hook, one.group, one.head, one.code))} " for one in codes]
    figure = go.Figure()
    figure.add_vline(x=result.base_rate, line={"color": style.MUTED, "width": 1.5, "dash": "dot"})
    figure.add_scatter(
        x=[one.null for one in codes],
        y=names,
        mode="markers",
        name="best of all codes, shuffled",
        marker={"symbol": "line-ns", "size": 13, "line": {"width": 2, "color": style.MUTED}},
        **marks.hovered("shuffled, best of all codes at this recall, 95th percentile: %{x:.1%}"),
    )
    rivals = (("neuron", "best neuron", style.ORANGE), ("latent", "best SAE latent", "#117733"))
    for kind, name, colour in rivals:
        found = [(at, getattr(one, kind)) for at, one in enumerate(codes)]
        found = [(at, one) for at, one in found if one is not None]
        if not found:
            continue
        x, y = [one.test.precision for _, one in found], [names[at] for at, _ in found]
        text = [f"{one.place} [{one.index}]: recall {one.test.recall:.1%}" for _, one in found]
        said = f"{name} %{{text}}<br>precision %{{x:.1%}}"
        look = {"symbol": "diamond-open", "line": {"width": 1.6}}
        marks.dots(figure, x, y, colour, 9, look=look, name=name, text=text, said=said)
    text = [
        f"<b>{one.name}</b><br>recall {one.test.recall:.1%}, active at {one.test.support} "
        f"{result.unit}s<br>where it was picked: precision {one.train.precision:.1%}, recall "
        f"{one.train.recall:.1%}<br>p {number(one.p)}"
        for one in codes
    ]
    x, said = [one.test.precision for one in codes], "%{text}<br>precision %{x:.1%}"
    marks.dots(figure, x, names, style.BLUE, 10, name="code", text=text, said=said)
    for one, name in zip(codes, names, strict=True):
        figure.add_annotation(
            x=1.17, y=name, text=_percent(one.test.recall), showarrow=False, xanchor="center",
            font={"size": 11, "color": style.INK},
        )  # fmt: skip
    figure.add_annotation(
        x=1.17, y=1, yref="paper", yanchor="bottom", text="recall", showarrow=False,
        font={"size": 11, "color": style.MUTED},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=True)
    figure.update_xaxes(
        range=[-0.03, 1.27], tickformat=".0%", title="precision", tickvals=[0, 0.25, 0.5, 0.75, 1]
    )
    marks.legend_below(figure)
    heading = f"Codes for {result.asked}" if title == "" else title
    subtitle = f"{result.made.get('n_test')} other series; dotted: base rate"
    subtitle += f" {_percent(result.base_rate)}"
    left, height = style.room_for(names) + 2, 26 * len(codes) + 24
    return style.finish(
        figure, heading, subtitle, plot_height=height, above=16, below=116, left=left
    )


@draw.register
def draw_similar_codes(result: SimilarCodes, *, title: str | None = "") -> go.Figure:
    """Codes like one code: shared places, or cosine, as bars."""
    values = result.overlap if result.by == "overlap" else result.cosine
    label = {
        "overlap": "shared share of the places of either",
        "cosine": "cosine of entries",
    }[result.by]
    heading = f"Codes like {_short_code(result.of)}" if title == "" else title
    hover = [f"lift {number(x)}, cosine {number(c)}" for x, c in zip(result.lift, result.cosine,
                                                                   strict=True)]  # fmt: skip
    return _bars(result.codes, values, label, heading, "", hover, [min(0.0, *values, 0.0), 1.02])


@draw.register
def draw_changed_codes(result: ChangedCodes, *, n: int = 15, title: str | None = "") -> go.Figure:
    """Codes whose share of positions differs most between two series.

    Args:
        n: codes.
    """
    difference = (result.share[:, 1] - result.share[:, 0])[:n]
    first, second = result.series
    heading = f"Codes of series {second} against {first}" if title == "" else title
    hover = [
        f"{_percent(a)} of the positions of {first}, {_percent(b)} of {second}"
        for a, b in result.share[:n]
    ]
    end = float(np.abs(difference).max()) * 1.15 if len(difference) else 1.0
    label = f"share in series {second} minus {first}"
    return _bars(result.codes[:n], difference, label, heading, "", hover, [-end, end], signed=True)


@draw.register
def draw_common_codes(result: CommonCodes, *, n: int = 15, title: str | None = "") -> go.Figure:
    """How often the codes that a set of series shares are active in other series.

    Args:
        n: codes.
    """
    heading = f"Codes that {result.asked} share" if title == "" else title
    subtitle = f"{len(result)} codes, in {result.n_series} series"
    hover = [f"{_percent(one)} of the set" for one in result.inside[:n]]
    values, label = result.outside[:n], "share of the other series"
    return _bars(result.codes[:n], values, label, heading, subtitle, hover, [0.0, 1.08])


@draw.register
def draw_code_index(result: CodeIndex, *, title: str | None = "") -> go.Figure:
    """How often codes are used: share of places by rank, a line per hook point."""
    figure = go.Figure()
    for at, book in enumerate(result.books.values()):
        share = np.sort(book.support / max(int(book.n_observed), 1))[::-1]
        share = share[share > 0]
        name = f"{_short(book.hook)} ({len(share)} of {book.n_units})"
        rank, color = np.arange(1, len(share) + 1), style.LINES[at % len(style.LINES)]
        said = "rank %{x}: %{y:.2%} of places"
        marks.curve(figure, rank, share, color, name=name, said=said)
    figure.update_xaxes(title="code, by rank", rangemode="tozero")
    figure.update_yaxes(tickformat=".2~%", type="log", dtick=1)
    marks.legend_below(figure)
    above = style.label_above(figure, "share of observed places at which a code is active")
    heading = "How often codes are used" if title == "" else title
    subtitle = f"{result.made.get('data', '')} {result.made.get('split', '')}".strip()
    below = 84 + 17 * len(result.books)
    return style.finish(
        figure, heading, subtitle, plot_height=240, above=above + 4, below=below, left=56
    )


@draw.register
def draw_code_windows(
    result: CodeWindows, *, channels: Any = None, n: int = 60, title: str | None = ""
) -> go.Figure:
    """A code's prototype: mean and spread of its windows, and single windows behind it.

    Args:
        channels: which to draw; None for the first twelve.
        n: single windows behind the mean.

    Raises:
        ArgumentError: the code has no windows, or there is no such channel.
    """
    if not len(result):
        raise ArgumentError(f"code {result.code} at {result.hook} is never active on these series")
    count = result.values.shape[1]
    wanted = list(range(min(count, MOST_CHANNELS))) if channels is None else list(channels)
    if not wanted or not all(0 <= one < count for one in wanted):
        raise ArgumentError(f"expected channels in 0..{count - 1}, got {wanted}")
    mean, spread = result.prototype()
    columns = min(len(wanted), 3)
    rows = -(-len(wanted) // columns)
    mixed = len(result.channel) and result.channel[0] < 0
    names = [f"channel {one}" if mixed else "the channel that is read" for one in wanted]
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=names, shared_xaxes=True,
        vertical_spacing=0.36 / max(rows, 2), horizontal_spacing=0.1,
    )  # fmt: skip
    x = np.arange(result.values.shape[2]) - int(np.round(np.mean(result.start - result.first)))
    gap = np.full((min(n, len(result)), 1), np.nan)
    for at, one in enumerate(wanted):
        where: dict[str, Any] = {"row": at // columns + 1, "col": at % columns + 1}
        single = np.concatenate([result.values[:n, one], gap], axis=1).ravel()
        figure.add_scatter(
            x=np.tile(np.append(x, x[-1]), len(gap)), y=single, mode="lines", hoverinfo="skip",
            line={"width": 0.7, "color": "rgba(93,107,122,0.22)"}, showlegend=False, **where,
        )  # fmt: skip
        low, high = mean[one] - spread[one], mean[one] + spread[one]
        marks.band(figure, x, low, high, "rgba(33,102,172,0.18)", **where)
        said = "sample %{x:+d}: %{y:.3g}"
        marks.curve(figure, x, mean[one], style.BLUE, 2.4, said=said, **where)
    figure.update_annotations(font={"size": 11, "color": style.MUTED}, yshift=-4)
    figure.update_xaxes(title="samples from the start of the window", row=rows, col=1)
    name = (result.hook, result.group, result.head, result.code)
    heading = f"Prototype of {_short_code(name)}" if title == "" else title
    subtitle = f"mean and standard deviation of {len(result)} windows of {result.n_places}"
    return style.finish(figure, heading, subtitle, plot_height=40 + 120 * rows, above=20)


def _bars(
    codes: tuple[Named, ...],
    values: np.ndarray,
    label: str,
    heading: str | None,
    subtitle: str,
    hover: list[str],
    limits: list[float],
    signed: bool = False,
) -> go.Figure:
    if not len(codes):
        raise ArgumentError("expected at least one code to draw, got none")
    names = [_short_code(code) + " " for code in codes]
    colours = [style.RED if signed and value < 0 else style.BLUE for value in values]
    figure = go.Figure(
        go.Bar(
            y=names, x=values, orientation="h", marker={"color": colours}, customdata=hover,
            text=[number(value, signed) if value else "0" for value in values],
            textposition="auto", textfont={"size": 10},
            hovertemplate="%{y}: %{x:.3f}<br>%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(range=limits, title=label)
    left, height = style.room_for(names) + 2, 24 * len(codes) + 20
    return style.finish(figure, heading, subtitle, plot_height=height, above=4, left=left)


def _percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.{0 if value >= 0.0995 else 1}f} %"


def _short(hook: str) -> str:
    return hook.replace("blocks.", "L", 1).replace("hook_", "")


def _short_code(name: Named) -> str:
    hook, group, head, code = name
    where = f" H{head}" if head is not None else f" g{group}" if group else ""
    return f"{code} at {_short(hook)}{where}"


@draw.register
def draw_code_effects(result: CodeEffects, *, title: str | None = "") -> go.Figure:
    """Mean effect with its 95 % interval over series, in front of every control's mean.

    What can mislead: the interval is of the mean over series, for these codes; where the line lies
    among the grey ones is what tells them from random codes.
    """
    effect, controls = result.effect(), result.control_effects().mean(2)  # [control, dose]
    x = np.arange(len(result.doses), dtype=float)
    ticks = [str(dose) for dose in result.doses]
    half = result.half_width()
    table = result.summary()
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": style.FAINT, "width": 1.5})
    for at, control in enumerate(controls):
        said = (
            f"<b>{_said(result.control_codes[at])}</b><br>active at "
            f"{100 * float(result.control_frequency[at]):.1f} % of places<br>%{{y:+.3f}}"
        )
        name = f"{len(controls)} random codes as frequent"
        group = {"legendgroup": "controls", "showlegend": at == 0}
        marks.curve(figure, x, control, style.FAINT, 1, name=name, said=said, dots=4, **group)
    random: dict[str, Any] = {"name": "their mean", "said": "mean of the random codes<br>%{y:+.3f}"}
    marks.curve(figure, x, controls.mean(0), style.MUTED, dash="dot", **random)
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
        error_y=interval if np.isfinite(half).all() else None,
        name=_said(result.codes),
        **marks.hovered(hover),
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
    marks.legend_below(figure)
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
