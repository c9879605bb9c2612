"""What a predicate sees: every window of a data set at once, with properties a person can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from tstlens.arguments import checked
from tstlens.codebooks.book import cut
from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import BANDS, SHORTEST, of_window, widened, windows
from tstlens.errors import ArgumentError, InputError, SeriesShapeError, UnknownNameError
from tstlens.saes.reading.activity import Spans

_SHARED = ("level", "slope", "variance", *(name for name, _, _ in BANDS))
_OWN = ("curvature", "peak", "trough", "range", "frequency")
_PLACE = ("series", "channels", "pos", "start", "stop", "label")
RESERVED = frozenset((*_SHARED, *_OWN, *_PLACE, "values", "distance", "of"))  # no column's name


class OneByOne(Exception):
    """Asked for what only a single window has; the predicate is then called window by window."""


class SearchWindows:
    """Windows of all positions of all series, as columns of numbers.

    Every property is an array with one value per window, so that ``window.slope > 1.0`` is one
    comparison for all. Windows are the samples that a position was embedded from, widened to at
    least 8 around the same centre, since one sample has no slope; padding takes no part. Where
    the model mixes channels, properties are those of the mean over channels, and
    ``window.of(3).slope`` those of channel 3.

    ``level`` is the mean; ``slope`` the least-squares slope per sample; ``curvature`` twice the
    square term of a least-squares parabola, per sample squared; ``peak`` and ``trough`` the largest
    and smallest value, ``range`` their difference; ``variance`` the mean squared deviation, and
    ``low``, ``middle`` and ``high`` its parts by frequency (thirds up to half a cycle per sample);
    ``frequency`` the strongest one, in cycles per sample. ``series``, ``channels`` (the one that is
    read, -1 where they are mixed), ``pos``, ``start``, ``stop`` and ``label`` say where it is, and
    columns that the index was built with go by their names.

    Args:
        data: the series.
        spans: samples of every position.
        n_channels: rows of the trunk per series.
        columns: name -> [series, pos].
        shortest: samples of the shortest window.
        channel: of which channel; None for the mean, or for the one that is read.
    """

    @checked
    def __init__(
        self,
        data: TimeSeriesData,
        spans: Spans,
        n_channels: int,
        columns: Mapping[str, np.ndarray],
        shortest: int = SHORTEST,
        channel: int | None = None,
    ) -> None:
        self._data, self._spans, self._rows, self._shortest = data, spans, n_channels, shortest
        self._columns, self._channel = columns, channel
        self._wide = widened(spans, data.n_time, shortest)
        self._known: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._data) * self._rows * len(self._spans)

    @checked
    def of(self, channel: int) -> SearchWindows:
        """The same windows, seen in one channel."""
        if self._rows > 1:
            raise ArgumentError(
                "this model reads every channel by itself: window.channels says which one a window "
                "is of"
            )
        if not 0 <= channel < self._data.n_channels:
            raise ArgumentError(
                f"expected a channel in 0..{self._data.n_channels - 1}, got {channel}"
            )
        return SearchWindows(
            self._data, self._spans, self._rows, self._columns, self._shortest, int(channel)
        )

    @checked
    def distance(self, motif: Any, normalize: bool = False) -> Float[np.ndarray, " window"]:
        """Root mean square difference from a motif, of as many samples around the same centre.

        NaN where these samples are padded or leave the series. With several channels a motif
        [sample] is compared with their mean (or the one channel asked for), a motif
        [channel, sample] with each.

        Args:
            motif: [sample] or [channel, sample], in the units of the series.
            normalize: compare shapes alone: both are brought to mean 0 and standard deviation 1,
                channel by channel; a constant stays at 0.
        """
        motif = np.asarray(motif, dtype=np.float64)
        if motif.ndim not in (1, 2) or motif.shape[-1] < 2 or not np.isfinite(motif).all():
            raise SeriesShapeError(
                "expected a motif [sample] or [channel, sample] of finite numbers, at least 2 "
                f"samples, got {list(motif.shape)}"
            )
        by_channel = motif.ndim == 2
        if by_channel and (self._rows > 1 or len(motif) != self._data.n_channels):
            raise SeriesShapeError(
                f"expected a motif of {1 if self._rows > 1 else self._data.n_channels} channels, "
                f"got {len(motif)}"
            )
        shape = motif if by_channel else motif[None]
        shape = _standard(shape) if normalize else shape
        series, channel, _ = self._places()
        parts = []
        step = max(1, 4_000_000 // (motif.shape[-1] * self._data.n_channels))
        for first in range(0, len(self), step):
            at = slice(first, first + step)
            pos = self._places()[2][at]
            own = channel[at] if self._rows > 1 else None
            values, _ = cut(self._data, series[at], own, pos, self._spans, motif.shape[-1])
            if not by_channel and self._rows == 1:
                one = self._channel
                values = values.mean(1, keepdims=True) if one is None else values[:, [one]]
            values = _standard(values) if normalize else values
            parts.append(np.sqrt(((values - shape) ** 2).mean((1, 2))))
        return np.concatenate(parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "values":
            raise OneByOne
        if name not in self._known:
            self._known |= self._compute(name)
        return self._known[name]

    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape = len(self._data), self._rows, len(self._spans)
        series, channel, pos = np.indices(shape)
        return series.ravel(), channel.ravel(), pos.ravel()

    def _compute(self, name: str) -> dict[str, np.ndarray]:
        if name in _PLACE:
            series, channel, pos = self._places()
            ends = np.array(self._spans)
            labels = self._data.labels
            return {
                "series": series,
                "channels": channel if self._rows > 1 else np.full(len(series), -1),
                "pos": pos,
                "start": ends[pos, 0],
                "stop": ends[pos, 1],
                "label": np.full(len(series), -1)
                if labels is None
                else labels.cpu().numpy()[series],
            }
        if name in self._columns:
            values = np.repeat(self._columns[name][:, None], self._rows, axis=1)
            return {name: values.ravel()}
        if name in _SHARED:
            found = [of_window(self._seen_as(v), seen) for v, seen in self._windows()]
            kinds = np.stack(found, axis=2)  # [series, row, pos, kind]
            return {kind: kinds[..., i].ravel() for i, kind in enumerate(_SHARED)}
        if name in _OWN:
            found = [_shapes(self._seen_as(v), seen) for v, seen in self._windows()]
            return {kind: np.stack([f[kind] for f in found], axis=2).ravel() for kind in _OWN}
        known = (*_SHARED, *_OWN, *_PLACE, "values", *self._columns)
        raise UnknownNameError(name, known, "This is what window has, beside of() and distance()")

    def _windows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return windows(self._data, self._wide)

    def _seen_as(self, values: np.ndarray) -> np.ndarray:
        """[series, row, sample]: each channel, their mean, or the one asked for."""
        if self._rows > 1:
            return values
        if self._channel is not None:
            return values[:, [self._channel]]
        return values.mean(1, keepdims=True)


class OneWindow:
    """One window, for predicates that only work on numbers; see :class:`SearchWindows`.

    ``values`` is its raw samples [channel, sample], NaN at padding.
    """

    def __init__(self, windows: SearchWindows, index: int) -> None:
        self._windows, self._index = windows, index

    def of(self, channel: int) -> OneWindow:
        """The same window, seen in one channel."""
        known = self._windows._known
        if f"of {channel}" not in known:
            known[f"of {channel}"] = self._windows.of(channel)  # type: ignore[assignment]
        return OneWindow(known[f"of {channel}"], self._index)  # type: ignore[arg-type]

    def distance(self, motif: Any, normalize: bool = False) -> float:
        """See :meth:`SearchWindows.distance`."""
        array = np.asarray(motif, dtype=np.float64)
        key = f"distance {array.shape} {array.tobytes()!r} {normalize}"
        known = self._windows._known
        if key not in known:
            known[key] = self._windows.distance(array, normalize)
        return float(known[key][self._index])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "values":
            return self._raw()
        return getattr(self._windows, name)[self._index].item()

    def _raw(self) -> np.ndarray:
        every = self._windows
        series, channel, pos = (int(getattr(self, n)) for n in ("series", "channels", "pos"))
        first, last = every._wide[pos]
        values = every._data.series[series, :, first:last].double().numpy()
        if every._data.mask is not None:
            values = np.where(every._data.mask[series, first:last].numpy(), values, np.nan)
        channel = every._channel if channel < 0 and every._channel is not None else channel
        return values if channel < 0 else values[[channel]]


def _shapes(values: np.ndarray, seen: np.ndarray) -> dict[str, np.ndarray]:
    """Curvature, peak, trough, range and strongest frequency, [series, row] each."""
    weight = np.broadcast_to(seen[:, None] > 0, values.shape)
    any_seen = weight.any(2)
    peak = np.where(any_seen, np.where(weight, values, -np.inf).max(2), np.nan)
    trough = np.where(any_seen, np.where(weight, values, np.inf).min(2), np.nan)
    count = np.maximum(weight.sum(2, keepdims=True), 1)
    rest = np.where(weight, values - np.where(weight, values, 0).sum(2, keepdims=True) / count, 0)
    power = np.abs(np.fft.rfft(rest, axis=2)) ** 2
    power[..., 0] = 0
    frequency = np.fft.rfftfreq(values.shape[2])[power.argmax(2)]
    return {
        "curvature": _curvature(rest, weight),
        "peak": peak,
        "trough": trough,
        "range": peak - trough,
        "frequency": np.where(any_seen, frequency, np.nan),
    }


def _curvature(rest: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Twice the square term of a least-squares parabola; 0 from fewer than three samples."""
    time = np.arange(rest.shape[2]) - (rest.shape[2] - 1) / 2
    design = np.stack([np.ones_like(time), time, time**2])  # [term, sample]
    seen = weight.astype(float)
    gram = np.einsum("srt,it,jt->srij", seen, design, design)
    right = np.einsum("srt,it->sri", rest * seen, design)
    enough = seen.sum(2) >= 3
    gram = np.where(enough[..., None, None], gram, np.eye(3))
    solved = np.linalg.solve(gram, right[..., None])[..., 0]
    return np.where(enough, 2 * solved[..., 2], 0.0)


def _standard(values: np.ndarray) -> np.ndarray:
    spread = values.std(-1, keepdims=True)
    return (values - values.mean(-1, keepdims=True)) / np.where(spread > 1e-12, spread, 1)


def evaluated(
    predicate: Callable[[Any], Any], windows: SearchWindows
) -> tuple[Bool[np.ndarray, " window"], bool]:
    """Where a predicate holds, and whether it took all windows at once."""
    try:
        found = predicate(windows)
        array = np.asarray(found)
        if array.shape == (len(windows),) and array.dtype == bool:
            return array, True
    except (OneByOne, ValueError, TypeError) as error:
        # An ambiguous truth value, math.sin of an array and the like: not made for arrays.
        if isinstance(error, InputError):
            raise
    held = [predicate(OneWindow(windows, index)) for index in range(len(windows))]
    wrong = next((one for one in held if not isinstance(one, bool | np.bool_)), None)
    if wrong is not None:
        raise ArgumentError(
            f"expected a predicate that gives True or False for a window, got {wrong!r}"
        )
    return np.array(held, dtype=bool), False
