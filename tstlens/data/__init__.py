"""Series and labels, where they come from, and the pairs that patching compares.

Importing this package imports neither aeon nor pandas.
"""

from __future__ import annotations

from tstlens.data.corruptions import (
    corrupt_with_mean,
    corrupt_with_noise,
    corrupt_with_sample,
    corrupt_with_shift,
)
from tstlens.data.described import load_described
from tstlens.data.forecasting import ForecastWindows, load_forecasting, recorded_series
from tstlens.data.loading import load_dataset
from tstlens.data.pairs import Pairs, class_pairs, misclassified_pairs
from tstlens.data.planted import (
    PlantedTask,
    planted,
    planted_names,
    score_features,
    score_states,
    score_where,
)
from tstlens.data.regime import RegimeMachine, RegimeSeries
from tstlens.data.scaling import Scaling
from tstlens.data.series import TimeSeriesData
from tstlens.data.validate import check_series

__all__ = [
    "ForecastWindows",
    "Pairs",
    "PlantedTask",
    "RegimeMachine",
    "RegimeSeries",
    "Scaling",
    "TimeSeriesData",
    "check_series",
    "class_pairs",
    "corrupt_with_mean",
    "corrupt_with_noise",
    "corrupt_with_sample",
    "corrupt_with_shift",
    "load_dataset",
    "load_described",
    "load_forecasting",
    "misclassified_pairs",
    "planted",
    "planted_names",
    "recorded_series",
    "score_features",
    "score_states",
    "score_where",
]
