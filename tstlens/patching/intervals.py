"""Means over pairs and their bootstrap intervals.

Pairs that share a corrupted series are not independent: give ``clusters`` and whole clusters are
drawn. The interval answers "had other series of this kind been picked"; it does not cover having
looked at many sites and named the strongest, nor another training seed of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from tstlens.arguments import Draws, Seed, Share, checked
from tstlens.errors import ArgumentError
from tstlens.patching.result import SweepResult
from tstlens.stats import (
    FEWEST,
    by_cluster,
    check_intervals,
    limits_of,
    mean_interval,
    strongest_share,
)

Kind = Literal["effect", "normalized", "value"]


@dataclass(frozen=True)
class Interval:
    """Mean over pairs with a bootstrap interval.

    Args:
        mean: [*axes], the mean; for "normalized" the mean effect over the mean gap.
        low: [*axes], lower end; NaN where there are fewer than 5 clusters, or none of them has an
            effect, and where an effect is not finite.
        high: [*axes], upper end.
        n_pairs: pairs averaged over.
        n_clusters: independent groups among them.
        level: coverage, 0.95 for a 95 % interval.
        strongest: [*axes], in which fraction of the resamples this site is the largest in size;
            NaN with fewer than 5 clusters.
    """

    mean: Float[np.ndarray, "*axes"]
    low: Float[np.ndarray, "*axes"]
    high: Float[np.ndarray, "*axes"]
    n_pairs: int
    n_clusters: int
    level: float
    strongest: Float[np.ndarray, "*axes"]


@checked
def over_pairs(
    result: SweepResult,
    kind: Kind = "effect",
    *,
    clusters: Sequence[Any] | None = None,
    level: Share = 0.95,
    n_resamples: Draws = 2000,
    seed: Seed = 0,
) -> Interval:
    """The mean over pairs of every site, with its bootstrap interval.

    Args:
        result: a sweep with its pair axis.
        kind: "effect" or "value" in the metric's unit, or "normalized" (mean effect over mean
            gap, resampled together).
        clusters: one hashable per pair; pairs of one cluster are drawn together. Every pair by
            itself where None.
        level: coverage.
        n_resamples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        ArgumentError: the result was averaged over pairs, or clusters of another length.

    Source: :func:`tstlens.stats.mean_interval`, which gives the rule and its coverage. Ends lie
    within what the metric can be: where the corrupted runs have a mean log-probability of -0.2, no
    mean effect passes 0.2.

    Example:
        >>> import torch
        >>> result = SweepResult(torch.arange(12.0).view(6, 2), ("pair", "layer"),
        ...     {"pair": tuple(range(6)), "layer": (0, 1)}, torch.zeros(6), torch.ones(6),
        ...     "logit", "logit", "attn_out")
        >>> over_pairs(result).mean
        array([5., 6.])
    """
    check_intervals(level, n_resamples, "n_resamples")
    if "pair" not in result.axes:
        raise ArgumentError("expected a result with its pair axis; it was averaged over before")
    n_pairs = result.values.shape[0]
    if clusters is not None and len(clusters) != n_pairs:
        raise ArgumentError(f"expected one cluster per pair [{n_pairs}], got {len(clusters)}")
    values, baseline, clean = (
        part.detach().double().cpu().numpy()
        for part in (result.values, result.baseline, result.clean)
    )
    shape = values.shape[1:]
    values = values.reshape(n_pairs, -1)
    low, high = limits_of(result.unit, baseline, values[np.isfinite(values)], known=result.range)
    weight = np.ones(n_pairs)
    if kind != "value":
        values = result.effect().detach().double().cpu().numpy().reshape(n_pairs, -1)
        low, high = low - baseline.mean(), high - baseline.mean()
    if kind == "normalized":
        weight = clean - baseline
        gap = weight.mean()
        low, high = sorted((low / gap, high / gap)) if gap else (-np.inf, np.inf)
    names = list(range(n_pairs)) if clusters is None else list(clusters)
    both, _ = by_cluster(np.column_stack([values, weight]), names)
    sums, weights = both[:, :-1], both[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums.sum(0) / weights.sum()
    mean[~np.isfinite(mean)] = np.nan
    low, high = mean_interval(
        sums, weights, level=level, n_boot=n_resamples, seed=seed, limits=(low, high)
    )
    strongest = np.full_like(mean, np.nan)
    if len(sums) >= FEWEST and mean.size:
        strongest = strongest_share(sums, n_resamples, seed)
    return Interval(
        mean.reshape(shape),
        low.reshape(shape),
        high.reshape(shape),
        n_pairs,
        len(sums),
        level,
        strongest.reshape(shape),
    )
