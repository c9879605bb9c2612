"""The stretches of raw series where a latent is strongest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.results import Result
from tstlens.saes.reading.activity import Activity

if TYPE_CHECKING:
    import pandas as pd

Spans = tuple[tuple[int, int], ...]


def spans_of(model: HookedTST, n_pos: int, n_time: int, spans: Spans | None = None) -> Spans:
    """(first, one past last) sample that every position was embedded from.

    Raises:
        ArgumentError: the front end is a custom one, so that ``spans`` has to say it, or
            ``spans`` does not fit.
    """
    if spans is None:
        found = [model.time_span(pos, n_time) for pos in range(n_pos)]
        return tuple((part.start, part.stop) for part in found)
    given = tuple((int(first), int(last)) for first, last in spans)
    if len(given) != n_pos or any(not 0 <= a < b <= n_time for a, b in given):
        raise ArgumentError(
            f"expected spans of {n_pos} positions as (first, one past last) sample within "
            f"0..{n_time}, got {len(given)}: {str(given[:3])[1:-1]} ..."
        )
    return given


def cells_of(model: HookedTST, n_pos: int, n_time: int) -> Spans:
    """(first, one past last) sample that figures draw every position at."""
    found = [model.time_cell(pos, n_time) for pos in range(n_pos)]
    return tuple((part.start, part.stop) for part in found)


@dataclass(frozen=True, eq=False)
class Window:
    """One stretch of one series.

    Args:
        series: index of the series in the data.
        channel: the channel that was read; None where the model mixes channels.
        pos: position of the trunk.
        start: first sample that the position was embedded from.
        stop: one past the last.
        activation: of the latent at this position.
        label: class name of the series, or None.
        values: the whole raw series [channel, time], NaN where it is padding.
        over_time: activation of the latent at every position of this row, NaN at padding.
        cells: samples to draw every position at.
    """

    series: int
    channel: int | None
    pos: int
    start: int
    stop: int
    activation: float
    label: str | None
    values: Float[np.ndarray, "channel time"] = field(repr=False)
    over_time: Float[np.ndarray, " pos"] = field(repr=False)
    cells: Spans = field(repr=False)


@dataclass(frozen=True, eq=False)
class Windows(Result):
    """The windows where a latent is strongest, strongest first.

    Args:
        latent: which latent.
        windows: the windows.
        hook: where the latent lives.
    """

    latent: int
    windows: tuple[Window, ...]
    hook: str = ""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per window: series, channel, pos, start, stop, activation, label."""
        import pandas as pd

        names = ("series", "channel", "pos", "start", "stop", "activation", "label")
        rows = [[getattr(window, name) for name in names] for window in self.windows]
        return pd.DataFrame(rows, columns=list(names)).rename_axis("rank")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        return self.windows[index]

    def __repr__(self) -> str:
        shown = ", ".join(f"series {w.series} [{w.start}:{w.stop}]" for w in self.windows[:4])
        more = ", ..." if len(self.windows) > 4 else ""
        return f"Windows(latent {self.latent}, {len(self.windows)}: {shown}{more})"


def top_slots(activity: Activity, latent: int, n: int) -> np.ndarray:
    """Slots of the ``n`` rows where a latent is strongest, one slot per row, strongest first.

    One per row (series, or series and channel), since neighbouring positions of one series see
    nearly the same samples. Ties go to the earlier slot.
    """
    slots, values = activity.column(latent)
    order = np.lexsort((slots, -values))
    order = order[values[order] > 0]
    _, first = np.unique(slots[order] // activity.n_pos, return_index=True)
    return slots[order[np.sort(first)[:n]]]


def top_windows(
    activity: Activity,
    data: TimeSeriesData,
    spans: Spans,
    cells: Spans,
    latent: Any,
    n: Any,
    hook: str = "",
) -> Windows:
    """The ``n`` windows where a latent is strongest, at most one per series (and channel).

    Raises:
        ArgumentError: no such latent, or n below 1.
    """
    activity.check(latent)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ArgumentError(f"expected n of at least 1, got {n!r}")
    dense = activity.of(latent)
    found = []
    for slot in top_slots(activity, latent, n):
        series, channel, pos = activity.slot(slot)
        start, stop = spans[pos]
        found.append(
            Window(
                series=series,
                channel=channel if activity.n_channels > 1 else None,
                pos=pos,
                start=start,
                stop=stop,
                activation=float(dense[series, channel, pos]),
                label=label_of(data, series),
                values=raw_series(data, series),
                over_time=dense[series, channel],
                cells=cells,
            )
        )
    return Windows(int(latent), tuple(found), hook)


def label_of(data: TimeSeriesData, series: int) -> str | None:
    """Class name of a series, or None where there are no labels."""
    return None if data.labels is None else data.class_names[int(data.labels[series])]


def raw_series(data: TimeSeriesData, series: int) -> Float[np.ndarray, "channel time"]:
    """One series as it was given, NaN where it is padding."""
    values = data.series[series].double().cpu().numpy()
    if data.mask is None:
        return values
    return np.where(data.mask[series].cpu().numpy()[None], values, np.nan)


def shapes(
    data: TimeSeriesData, rows: Sequence[tuple[int, int | None, int]], length: int, spans: Spans
) -> Float[np.ndarray, "window sample"]:
    """Equally long raw windows around positions, each channel centred on the data's mean.

    Windows that hold padding are left out.

    Args:
        data: the series.
        rows: (series, channel or None for all, position).
        length: samples; the window is centred on the position and shifted to lie in the series.
        spans: samples of every position.
    """
    values = data.series.double().cpu().numpy()
    seen = None if data.mask is None else data.mask.cpu().numpy()
    if seen is None:
        mean = values.mean((0, 2))[:, None]
        spread = values.std((0, 2))[:, None]
    else:
        masked = np.where(seen[:, None], values, np.nan)
        mean, spread = np.nanmean(masked, (0, 2))[:, None], np.nanstd(masked, (0, 2))[:, None]
    spread = np.where(spread > 0, spread, 1)
    found = []
    for series, channel, pos in rows:
        centre = sum(spans[pos]) // 2
        start = min(max(centre - length // 2, 0), values.shape[2] - length)
        part = slice(start, start + length)
        if seen is not None and not seen[series, part].all():
            continue
        window = ((values[series] - mean) / spread)[:, part]
        found.append((window if channel is None else window[channel]).ravel())
    size = length * (1 if rows and rows[0][1] is not None else values.shape[1])
    return np.array(found).reshape(len(found), size)
