"""Intervals of means over series."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from tstlens.errors import ArgumentError

FEWEST = 5  # an interval from fewer series says nothing


def mean_interval(
    values: Float[np.ndarray, "series entry"], level: float, n_boot: int, seed: int
) -> tuple[Float[np.ndarray, " entry"], Float[np.ndarray, " entry"]]:
    """Ends of the percentile bootstrap interval of the mean over series, for every entry.

    Percentiles stay within what was measured, which a bootstrap-t interval of probabilities near 0
    or 1 does not; with fewer than about ten series they are too narrow. NaN below 5 series.

    Args:
        values: one row per series; whole rows are drawn.
        level: coverage.
        n_boot: resamples.
        seed: of the draws.

    Source: scipy.stats.bootstrap.
    """
    if len(values) < FEWEST:
        empty = np.full(values.shape[1], np.nan)
        return empty, empty
    from scipy.stats import bootstrap

    generator: Any = {"random_state": np.random.default_rng(seed)}  # "rng" from SciPy 1.15 on
    drawn = bootstrap(
        (values,),
        np.mean,
        axis=0,
        vectorized=True,
        n_resamples=n_boot,
        batch=max(1, 4_000_000 // max(1, values.size)),
        confidence_level=level,
        method="percentile",
        **generator,
    )
    low, high = drawn.confidence_interval
    return np.asarray(low), np.asarray(high)


def check_intervals(level: float, n_boot: int) -> None:
    """Raise :class:`ArgumentError` unless an interval can be made this way."""
    if not 0 < level < 1:
        raise ArgumentError(f"expected a level between 0 and 1, 0.95 say, got {level}")
    if n_boot < 100:
        raise ArgumentError(f"expected n_boot of at least 100, got {n_boot}")
