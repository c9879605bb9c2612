"""The bootstrap and the sign flips behind :mod:`tstlens.patching.statistics`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_CHUNK = 4_000_000  # numbers held at once while resampling


def bootstrap_t(
    sums: Float[np.ndarray, "cluster site"],
    counts: Float[np.ndarray, " cluster"],
    level: float,
    n_boot: int,
    generator: np.random.Generator,
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    """Ends of the bootstrap-t interval of the mean over pairs, drawing whole clusters.

    Args:
        sums: sums of effects over the pairs of each cluster.
        counts: pairs in each cluster.
        level: coverage.
        n_boot: resamples.
        generator: of the draws.
    """
    n = len(sums)
    mean, error = _studentise(np.ones((1, n)), sums, counts)
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(float)  # [boot, n]
    # A resample of one cluster over and over has no spread to divide by.
    drawn = drawn[(drawn > 0).sum(1) > 1]
    low, high = np.empty(sums.shape[1]), np.empty(sums.shape[1])
    tail = (1 - level) / 2
    per_chunk = max(1, _CHUNK // max(1, len(drawn)))
    for start in range(0, sums.shape[1], per_chunk):
        at = slice(start, start + per_chunk)
        of_boot, error_of_boot = _studentise(drawn, sums[:, at], counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(error_of_boot > 0, (of_boot - mean[:, at]) / error_of_boot, 0.0)
        first, last = np.quantile(t, [tail, 1 - tail], axis=0)
        low[at] = mean[0, at] - last * error[0, at]
        high[at] = mean[0, at] - first * error[0, at]
    return low, high


def _studentise(
    weights: np.ndarray, sums: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over pairs and its cluster-robust standard error, [boot, site]."""
    n = weights.sum(1)[:, None]
    total = (weights @ counts)[:, None]
    mean = weights @ sums / total
    # Sum of (sum - mean * count)^2 over clusters, expanded: no [boot, cluster, site] is made.
    square = (
        weights @ sums**2
        - 2 * mean * (weights @ (sums * counts[:, None]))
        + mean**2 * (weights @ counts**2)[:, None]
    )
    return mean, np.sqrt(np.maximum(square, 0.0) * n / (n - 1)) / total


def flip_p_values(
    sums: Float[np.ndarray, "cluster site"], n_flips: int, generator: np.random.Generator
) -> Float[np.ndarray, " site"]:
    """Two-sided p-values of the mean, flipping the signs of whole clusters.

    Exact where there are at most ``n_flips`` ways to flip; otherwise random flips, the one observed
    counted among them (so p is never 0). A site where nothing ever happens has p = 1.

    Args:
        sums: sums of effects over the pairs of each cluster.
        n_flips: how many flips.
        generator: of the flips.
    """
    n = len(sums)
    exact = n < 60 and 2**n <= n_flips
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1.0 - 2.0 * generator.integers(0, 2, (n_flips, n))
    observed = np.abs(sums.sum(0))
    # Flips that tie with what was observed count, in spite of rounding.
    bar = observed * (1 - 1e-9) - 1e-12 * np.abs(sums).sum(0)
    as_large = np.zeros(sums.shape[1])
    per_chunk = max(1, _CHUNK // max(1, sums.shape[1]))
    for start in range(0, len(signs), per_chunk):
        as_large += (np.abs(signs[start : start + per_chunk] @ sums) >= bar).sum(0)
    return as_large / len(signs) if exact else (as_large + 1) / (len(signs) + 1)
