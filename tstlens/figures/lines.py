"""Series as lines, with the effect of each position shaded behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots
from torch import Tensor

from tstlens.arguments import Positive, checked
from tstlens.data import Pairs
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.figures import marks, style
from tstlens.figures.maps import Scale
from tstlens.figures.sweeps import scale_of
from tstlens.figures.words import number
from tstlens.metrics import Better
from tstlens.patching import SweepResult

MOST_OVERLAID = 12


@checked
def series(
    series: Float[Tensor, "channel time"],
    *,
    effect: Float[Tensor, " pos"] | None = None,
    time_cells: Sequence[tuple[int, int]] | None = None,
    effect_label: str = "effect",
    title: str | None = None,
    channel_names: Sequence[str] | None = None,
    highlight: Sequence[int] | None = None,
    overlaid: bool | None = None,
    mask: Bool[Tensor, " time"] | None = None,
    limits: Positive | None = None,
    better: Better | None = None,
) -> go.Figure:
    """One series, a line per channel, the effect of every position shaded behind it.

    Blue shading is a position whose replacement improves the metric, red one that worsens it. What
    can mislead: a position has already mixed in what others hold, the more so the later the layer,
    so the shaded samples are where the model *keeps* what matters, not always where it comes from.

    Args:
        series: [channel, time], in the units of the data.
        effect: [pos], change of a metric; None for no shading.
        time_cells: first and one-past-last sample of every position (``result.time_cells``);
            needed with ``effect`` unless there is one position per sample.
        effect_label: what the effect is, with its unit.
        title: above the figure.
        channel_names: one per channel.
        highlight: channels drawn in colour, the others grey; all in colour where None.
        overlaid: lines over each other; True where None and there are up to 12 channels.
        mask: [time], False where the series is padding, which is not drawn.
        limits: end of the zero-centred colour scale; the largest effect where None.
        better: which direction of the effect is an improvement, ``"higher"`` or ``"lower"``; blue
            is more where None.

    Returns:
        A plotly figure.

    Raises:
        SeriesShapeError: not [channel, time], or an effect that does not match its cells.

    Example:
        >>> import torch
        >>> figure = series(torch.randn(3, 25), effect=torch.randn(25), effect_label="nats")
    """
    panel = _Panel("", series, effect, mask)
    scale = None
    if effect is not None:
        if not effect.is_floating_point():
            raise ArgumentError(f"expected effect as floating point numbers, got {effect.dtype}")
        largest = float(effect.abs().max()) if effect.numel() else 0.0
        end = limits or style.symmetric_limit(largest)
        scale = Scale(effect_label, -end, end, better=better)
    return _draw([panel], scale, time_cells, channel_names, highlight, overlaid, title)


@checked
def pair(
    pairs: Pairs,
    index: int,
    result: SweepResult | None = None,
    *,
    class_names: Sequence[str] | None = None,
    channel_names: Sequence[str] | None = None,
    highlight: Sequence[int] | None = None,
    overlaid: bool | None = None,
    limits: Positive | None = None,
    title: str | None = None,
) -> go.Figure:
    """Clean and corrupted series of a pair, one above the other on the same time axis.

    With a sweep over positions the effect of restoring each position is shaded behind both: behind
    the clean series it says what was taken, behind the corrupted one where it was put. What can
    mislead: as for :func:`series`.

    Args:
        pairs: the pairs.
        index: which of them.
        result: a sweep over these pairs whose only axes are pairs and positions (or samples):
            ``Site("resid_post", layer=0)`` over ("pos",), or a larger one after ``.mean(axis)``.
        class_names: for the headings (``data.class_names``); indices of the logits where None.
        channel_names: one per channel.
        highlight: channels drawn in colour, the others grey; all in colour where None.
        overlaid: lines over each other; True where None and there are up to 12 channels.
        limits: end of the zero-centred colour scale; the largest effect of this pair where None.
        title: above the figure.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: no such pair, or a result with other axes or of other pairs.

    Example:
        >>> import torch
        >>> from tstlens.data import Pairs
        >>> figure = pair(Pairs(*torch.randn(2, 4, 1, 30), torch.zeros(4, dtype=torch.int64)), 0)
    """
    index = marks.row_of(index, len(pairs), "a pair")
    effect, scale, cells = None, None, None
    if result is not None:
        if result.axes not in (("pair", "pos"), ("pair", "time")) or len(pairs) != len(
            result.values
        ):
            raise ArgumentError(
                f"expected a sweep of these {len(pairs)} pairs with axes ('pair', 'pos'), got "
                f"{result.axes} of {result.n_pairs} pairs; fix the rest with a Site, or average "
                "over it with result.mean(axis)"
            )
        grey = result.at_rounding()[index]
        effect, cells = result.effect()[index].masked_fill(grey, float("nan")), result.time_cells
        if "time" in result.axes:
            cells = [(sample, sample + 1) for sample in result.coords["time"]]
        scale = scale_of(result, effect.double().cpu().numpy(), "effect", limits)
    target = _class(class_names, int(pairs.target[index]))
    clean, corrupted = f"clean: true class {target}", "corrupted"
    if pairs.clean_index is not None:
        clean = f"clean: series {int(pairs.clean_index[index])}, class {target}"
    if pairs.corrupted_index is not None:
        corrupted = f"corrupted: series {int(pairs.corrupted_index[index])}"
    if pairs.predicted is not None:
        corrupted += f", seen as {_class(class_names, int(pairs.predicted[index]))}"
    masks = [
        None if mask is None else mask[index] for mask in (pairs.clean_mask, pairs.corrupted_mask)
    ]
    panels = [
        _Panel(clean, pairs.clean[index], effect, masks[0]),
        _Panel(corrupted, pairs.corrupted[index], effect, masks[1]),
    ]
    return _draw(panels, scale, cells, channel_names, highlight, overlaid, title)


def _class(names: Sequence[str] | None, index: int) -> str:
    if names is None:
        return f"index {index}"
    if index >= len(names):
        raise ArgumentError(f"expected a name for class {index} too, got {len(names)} class_names")
    return style.shortened(names[index], 16)


class _Panel:
    """A series with its heading, the effect behind it and its mask."""

    def __init__(
        self, name: str, values: Tensor, effect: Tensor | None, mask: Tensor | None
    ) -> None:
        if values.ndim != 2:
            raise SeriesShapeError(
                f"expected one series [channel, time], got {list(values.shape)}; take one of the "
                "batch with series[0]"
            )
        if mask is not None and mask.shape != values.shape[1:]:
            raise SeriesShapeError(
                f"expected a mask [time={values.shape[1]}], got {list(mask.shape)}"
            )
        self.name = name
        self.values = values.detach().double().cpu().numpy()
        self.effect = None if effect is None else effect.detach().double().cpu().numpy()
        if mask is not None:
            self.values = np.where(mask.cpu().numpy()[None], self.values, np.nan)


def _draw(
    panels: list[_Panel],
    scale: Scale | None,
    cells: Sequence[tuple[int, int]] | None,
    channel_names: Sequence[str] | None,
    highlight: Sequence[int] | None,
    overlaid: bool | None,
    title: str | None,
) -> go.Figure:
    n_channels, n_time = panels[0].values.shape
    names = [str(name) for name in channel_names or range(n_channels)]
    if len(names) != n_channels:
        raise ArgumentError(f"expected {n_channels} channel names, got {len(names)}")
    absent = [channel for channel in highlight or () if not 0 <= channel < n_channels]
    if absent:
        raise ArgumentError(f"expected highlight in 0..{n_channels - 1}, got {absent[0]}")
    overlaid = n_channels <= MOST_OVERLAID if overlaid is None else overlaid
    groups = [list(range(n_channels))] if overlaid else [[channel] for channel in range(n_channels)]
    rows = [(panel, group) for panel in panels for group in groups]
    headings = [
        ", ".join(
            part for part in (panel.name, "" if overlaid else f"channel {names[group[0]]}") if part
        )
        for panel, group in rows
    ]
    named = any(headings)
    each = 150 if overlaid else 76
    gap = 36 if named else 14
    height = each * len(rows) + gap * (len(rows) - 1)
    figure = make_subplots(
        rows=len(rows),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=gap / height if len(rows) > 1 else 0,
        subplot_titles=headings if named else None,
    )
    every = np.concatenate([panel.values for panel in panels], 1)
    for row, (panel, group) in enumerate(rows, start=1):
        low, high = float(np.nanmin(every[group])), float(np.nanmax(every[group]))
        ends = marks.padded(low, high, 0.06)
        if panel.effect is not None and scale is not None:
            figure.add_trace(_shading(panel.effect, cells, n_time, ends, scale), row=row, col=1)
        for channel in group:
            line = _line(panel, channel, names[channel], highlight)
            line.showlegend = overlaid and n_channels > 1 and row == 1 and line.showlegend
            figure.add_trace(line, row=row, col=1)
        figure.update_yaxes(range=ends, nticks=5 if overlaid else 3, row=row, col=1)
    figure.update_xaxes(range=[-0.5, n_time - 0.5], showgrid=False, zeroline=False)
    figure.update_xaxes(title={"text": "time (sample)"}, row=len(rows), col=1)
    figure.update_yaxes(zeroline=False, showgrid=scale is None)
    marks.headings_left(figure)
    below, above = 46, 20 if named else 0
    legend = overlaid and n_channels > 1
    if scale is not None:
        figure.update_layout(coloraxis=scale.coloraxis(height, pale=True))
        above = style.label_above(figure, f"shading: {scale.label}", 24 if named else 6)
    if legend:
        entries = n_channels if highlight is None else len(highlight) + 1
        below += 20 * -(-entries // 3) + 8
        figure.update_layout(legend={"y": 0, "yanchor": "top", "yref": "paper"})
    style.finish(figure, title, plot_height=height, above=above, below=below)
    if legend:
        figure.update_layout(legend={"y": -46 / height})
    return figure


def _line(panel: _Panel, channel: int, name: str, highlight: Sequence[int] | None) -> go.Scatter:
    values = panel.values[channel]
    grey = highlight is not None and channel not in highlight
    order = channel if highlight is None or grey else list(highlight).index(channel)
    others = grey and channel == min(set(range(len(panel.values))) - set(highlight or ()))
    return go.Scatter(
        x=np.arange(len(values)),
        y=values,
        mode="lines",
        name="other channels" if grey else f"channel {name}",
        showlegend=not grey or others,
        legendrank=2000 if grey else 1000,
        line={
            "color": style.FAINT if grey else style.LINES[order % len(style.LINES)],
            "width": 1 if grey else 1.8,
        },
        hovertemplate=f"channel {name}<br>sample %{{x}}: %{{y:.4g}}<extra></extra>",
        zorder=0 if grey else 1,
    )


def _shading(
    effect: np.ndarray,
    cells: Sequence[tuple[int, int]] | None,
    n_time: int,
    ends: list[float],
    scale: Scale,
) -> go.Heatmap:
    if cells is None and len(effect) == n_time:
        cells = [(sample, sample + 1) for sample in range(n_time)]
    if cells is None or len(cells) != len(effect):
        raise SeriesShapeError(
            f"expected one effect per position, got {len(effect)} effects and "
            f"{'no time_cells' if cells is None else f'{len(cells)} time_cells'}; pass "
            "time_cells=result.time_cells"
        )
    said = lambda value: f"{scale.label}: {number(value, signed=True)}"  # noqa: E731
    return marks.shaded(effect, cells, n_time, ends, said)
