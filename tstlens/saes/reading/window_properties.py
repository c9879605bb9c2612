"""Properties of the window of every latent's slot: level, slope, variance, frequencies, place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import widened
from tstlens.data.window_properties import window_properties as properties_of_windows
from tstlens.saes.reading.activity import Activity
from tstlens.saes.reading.windows import Spans


@dataclass(frozen=True, eq=False)
class WindowProperties:
    """Properties of the window of every slot.

    Args:
        values: [series, slot of a series, property].
        names: of the properties.
        weight: [series, slot of a series], 1 where the position is observed, else 0.
        length: samples that a window spans in the middle of a series.
    """

    values: Float[np.ndarray, "series slot property"]
    names: tuple[str, ...]
    weight: Float[np.ndarray, "series slot"]
    length: int


def window_properties(data: TimeSeriesData, activity: Activity, spans: Spans) -> WindowProperties:
    """Level, slope, variance, power in three frequency bands and place of every window.

    See :func:`tstlens.data.window_properties.window_properties`. For models that mix channels
    there is one set per channel (up to 32 channels) and one for the mean over channels; for models
    that read each channel by itself there is the channel's own, and one indicator per channel.
    """
    values, names = properties_of_windows(data, spans, per_channel=activity.n_channels > 1)
    weight = activity.observed.reshape(activity.n_series, -1).astype(float)
    length = max(b - a for a, b in widened(spans, data.n_time))
    return WindowProperties(values, names, weight, length)
