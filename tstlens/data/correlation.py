"""Pearson correlation of two things that were measured several times in every series."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import t


def clustered_correlation(
    units: Float[np.ndarray, "series slot unit"],
    predictors: Float[np.ndarray, "series slot predictor"],
    weight: Float[np.ndarray, "series slot"],
) -> tuple[Float[np.ndarray, "unit predictor"], Float[np.ndarray, "unit predictor"]]:
    """Pearson r over the observed slots, and p with *series* as the unit.

    Positions of one series are alike, so counting them as independent finds something everywhere.
    The covariance is a sum over series, and a t test asks whether these per-series sums are 0 on
    average (cluster-robust; as many degrees of freedom as series less one).

    Args:
        units: [series, slot, unit]; slots are positions (of every channel).
        predictors: [series, slot, predictor].
        weight: [series, slot], 1 where observed, else 0.

    Returns:
        r and two-sided p, [unit, predictor]; NaN where either is constant.

    Source: Pearson 1895; Liang and Zeger 1986 (clusters).
    """
    count = max(weight.sum(), 1)
    standard, constant = _standard(predictors, weight, count)
    scaled, dead = _standard(units, weight, count)
    sums = np.matmul(scaled.transpose(0, 2, 1), standard)  # [series, unit, predictor]
    n_series = len(sums)
    freedom = max(n_series - 1, 1)
    noise = sums.std(0) * np.sqrt(n_series / freedom)  # of one series' sum
    statistic = sums.mean(0) * np.sqrt(n_series) / np.where(noise > 0, noise, np.inf)
    valid = ~dead[:, None] & ~constant[None]
    r = np.where(valid, np.clip(sums.sum(0) / count, -1, 1), np.nan)
    return r, np.where(valid, 2 * t.sf(np.abs(statistic), freedom), np.nan)


def _standard(
    values: Float[np.ndarray, "series slot column"],
    weight: Float[np.ndarray, "series slot"],
    count: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of mean 0 and spread 1 over the observed slots, and which of them are constant."""
    mean = (values * weight[:, :, None]).sum((0, 1)) / count
    standard = (values - mean) * weight[:, :, None]
    spread = np.sqrt((standard**2).sum((0, 1)) / count)
    # Rounding leaves a constant column a spread of about (eps * mean), not 0.
    constant = spread <= 1e-9 * np.maximum(np.abs(mean), 1e-30)
    return standard / np.where(constant, np.inf, spread), constant
