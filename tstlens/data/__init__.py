"""Series and labels, where they come from, and the pairs that patching compares.

Importing this package imports neither aeon nor pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

if TYPE_CHECKING:
    from tstlens.data.forecasting import ForecastWindows, load_forecasting, recorded_series
    from tstlens.data.loading import load_dataset, load_described
    from tstlens.data.pairs import (
        Pairs,
        class_pairs,
        corrupt_with_mean,
        corrupt_with_noise,
        corrupt_with_sample,
        corrupt_with_shift,
        misclassified_pairs,
    )
    from tstlens.data.scaling import Scaling
    from tstlens.data.series import TimeSeriesData
    from tstlens.data.validate import check_series

__all__ = [
    "ForecastWindows",
    "Pairs",
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
    "recorded_series",
]

# Public elsewhere now; the old name works for one release.
_MOVED = {
    "PlantedTask": "tstlens.truth",
    "RegimeMachine": "tstlens.truth",
    "RegimeSeries": "tstlens.truth",
    "planted": "tstlens.truth",
    "planted_names": "tstlens.truth",
    "score_features": "tstlens.truth",
    "score_states": "tstlens.truth",
    "score_where": "tstlens.truth",
}

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__, _MOVED)
