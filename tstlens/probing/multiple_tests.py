"""False discoveries among many tests."""

from __future__ import annotations

import numpy as np


def adjusted(p: np.ndarray) -> np.ndarray:
    """q-values by Benjamini and Hochberg over all entries; NaN stays NaN and does not count."""
    from scipy.stats import false_discovery_control

    q = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = false_discovery_control(p[known], method="bh")
    return q
