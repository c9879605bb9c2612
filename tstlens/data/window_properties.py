"""Properties of raw windows that a person can name: level, slope, variance, frequencies, place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from tstlens.data.series import TimeSeriesData

SHORTEST = 8  # samples; narrower spans are widened, since one sample has neither slope nor spectrum
BANDS = (("low", 0.0, 1 / 6), ("middle", 1 / 6, 1 / 3), ("high", 1 / 3, 0.5))  # cycles per sample
MOST_CHANNELS = 32  # each with its own properties; beyond, the mean over channels only


def window_properties(
    data: TimeSeriesData, spans: Sequence[tuple[int, int]], *, per_channel: bool
) -> tuple[Float[np.ndarray, "series slot property"], tuple[str, ...]]:
    """Level, slope, variance, power in three frequency bands and place of every window.

    Level is the mean, slope the least-squares slope per sample, variance the mean squared
    deviation, and the three bands (thirds of the frequencies up to half a cycle per sample) add
    up to the variance. Padded samples take no part. Windows below 8 samples are widened first.

    Args:
        data: the series.
        spans: (first, one past last) sample of the window of every position.
        per_channel: slots are (channel, position), each with the channel's own properties and an
            indicator per channel; otherwise slots are positions, with one set for the mean over
            channels and one per channel (up to 32 channels).

    Returns:
        Values [series, slot, property] and the names of the properties.
    """
    by_pos = [of_window(*window) for window in windows(data, widened(spans, data.n_time))]
    kinds = np.stack(by_pos, axis=2)  # [series, channel, pos, kind]
    n_series, n_channels, n_pos, n_kinds = kinds.shape
    labels = ["level", "slope", "variance", *(f"{name} frequencies" for name, _, _ in BANDS)]
    place = np.broadcast_to(np.linspace(0, 1, n_pos)[None, :, None], (n_series, n_pos, 1))
    if per_channel:
        values = kinds.reshape(n_series, n_channels * n_pos, n_kinds)
        one_hot = np.repeat(np.eye(n_channels), n_pos, axis=0)[None]
        one_hot = np.broadcast_to(one_hot, (n_series, n_channels * n_pos, n_channels))
        values = np.concatenate([values, np.tile(place, (1, n_channels, 1)), one_hot], 2)
        names = [*labels, "position", *(f"channel {index}" for index in range(n_channels))]
        return values, tuple(names)
    mean = kinds.mean(1)
    parts, names = [mean], labels
    if n_channels > 1:
        names = [f"{label}, mean of channels" for label in labels]
        if n_channels <= MOST_CHANNELS:
            parts += [kinds[:, channel] for channel in range(n_channels)]
            names += [f"{kind}, channel {c}" for c in range(n_channels) for kind in labels]
    return np.concatenate([*parts, place], 2), (*names, "position")


def windows(
    data: TimeSeriesData, spans: Sequence[tuple[int, int]]
) -> list[tuple[Float[np.ndarray, "series channel sample"], Float[np.ndarray, "series sample"]]]:
    """The raw windows of every position, each with 1 where a sample was observed and else 0."""
    series = data.series.double().cpu().numpy()
    seen = np.ones((len(data), data.n_time)) if data.mask is None else data.mask.cpu().numpy()
    return [(series[:, :, a:b], seen[:, a:b].astype(float)) for a, b in spans]


def widened(
    spans: Sequence[tuple[int, int]], n_time: int, shortest: int = SHORTEST
) -> tuple[tuple[int, int], ...]:
    """Spans of at least ``shortest`` samples around the same centre, cut at the series' ends."""
    found = []
    for first, last in spans:
        missing = max(shortest - (last - first), 0)
        first, last = first - missing // 2, last + missing - missing // 2
        found.append((max(first, 0), min(last, n_time)))
    return tuple(found)


def of_window(
    values: Float[np.ndarray, "series channel sample"], seen: Float[np.ndarray, "series sample"]
) -> Float[np.ndarray, "series channel kind"]:
    """Level, slope, variance and the power of the three bands of one window per series."""
    weight = seen[:, None]
    total = np.maximum(weight.sum(2), 1)  # [series, 1]
    level = (values * weight).sum(2) / total
    rest = (values - level[:, :, None]) * weight
    time = np.arange(values.shape[2], dtype=float)
    time = (time - (time * weight).sum(2, keepdims=True) / total[:, :, None]) * weight
    squares = (time**2).sum(2)
    slope = (rest * time).sum(2) / np.where(squares > 0, squares, 1)
    variance = (rest**2).sum(2) / total
    power = np.abs(np.fft.fft(rest, axis=2)) ** 2 / (values.shape[2] * total[:, :, None])
    frequency = np.abs(np.fft.fftfreq(values.shape[2]))
    bands = [
        power[:, :, (frequency > low if low else frequency >= 0) & (frequency <= high)].sum(2)
        for _, low, high in BANDS
    ]
    return np.stack([level, slope, variance, *bands], axis=2)
