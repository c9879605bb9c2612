"""Means over pairs and their bootstrap intervals.

Pairs that share a corrupted series are not independent: give ``clusters`` and whole clusters are
drawn. The interval answers "had other series of this kind been picked"; it does not cover having
looked at many sites and named the strongest, nor another training seed of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.patching import SweepResult
from tstlens.patching.resampling import bootstrap_t

KINDS = ("effect", "normalized", "value")
FEWEST = 5  # a bootstrap over fewer independent series says nothing


@dataclass(frozen=True)
class Interval:
    """Mean over pairs with a bootstrap interval.

    Args:
        mean: [*axes], the mean; for "normalized" the mean effect over the mean gap.
        low: [*axes], lower end; NaN where there are fewer than 5 clusters.
        high: [*axes], upper end.
        n_pairs: pairs averaged over.
        n_clusters: independent groups among them.
        level: coverage, 0.95 for a 95 % interval.
        strongest: [*axes], in which fraction of the resamples this site is the largest in size;
            NaN where there is no interval.
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
    kind: str = "effect",
    *,
    clusters: Sequence[Any] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
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
        UnknownNameError: another kind.

    Source: bootstrap-t over clusters (Efron and Tibshirani 1993, chapter 12), as in
    :func:`tstlens.patching.summary`; for "normalized", a ratio, the percentile method of
    scipy.stats.bootstrap, whose intervals are too narrow for fewer than about ten series.

    Example:
        >>> import torch
        >>> result = SweepResult(torch.arange(12.0).view(6, 2), ("pair", "layer"),
        ...     {"pair": tuple(range(6)), "layer": (0, 1)}, torch.zeros(6), torch.ones(6),
        ...     "logit", "logit", "attn_out")
        >>> over_pairs(result).mean
        array([5., 6.])
    """
    check_kind(kind)
    if n_resamples < 100:
        raise ArgumentError(f"expected n_resamples of at least 100, got {n_resamples}")
    if "pair" not in result.axes:
        raise ArgumentError("expected a result with its pair axis; it was averaged over before")
    n_pairs = result.values.shape[0]
    if clusters is not None and len(clusters) != n_pairs:
        raise ArgumentError(f"expected one cluster per pair [{n_pairs}], got {len(clusters)}")
    shown = result.values if kind == "value" else result.effect()
    values = shown.double().cpu().numpy()
    shape = values.shape[1:]
    values = values.reshape(n_pairs, -1).T  # [site, pair]
    weight = np.ones(n_pairs)
    if kind == "normalized":
        weight = (result.clean - result.baseline).double().cpu().numpy()
    names = list(range(n_pairs)) if clusters is None else list(clusters)
    member = np.array([[name == one for one in names] for name in dict.fromkeys(names)], float)
    sums, weights = values @ member.T, np.broadcast_to(member @ weight, (len(values), len(member)))
    mean = _ratio(sums, weights, axis=-1)
    low, high, strongest = (np.full_like(mean, np.nan) for _ in range(3))
    if len(member) >= FEWEST and mean.size:
        low, high, strongest = _bootstrap(sums, weights, level, n_resamples, seed)
        if kind != "normalized":
            # Percentile ends are too narrow for few series (80 to 90 % coverage at 5 to 9).
            generator = np.random.default_rng(seed)
            low, high = bootstrap_t(sums.T, member.sum(1), level, n_resamples, generator)
    return Interval(
        mean.reshape(shape),
        low.reshape(shape),
        high.reshape(shape),
        n_pairs,
        len(member),
        level,
        strongest.reshape(shape),
    )


def check_kind(kind: str) -> None:
    """Raise UnknownNameError for a kind of value that does not exist."""
    if kind not in KINDS:
        raise UnknownNameError(kind, KINDS, "this names what a figure shows")


def _ratio(sums: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = sums.sum(axis) / weights.sum(axis)
    return np.where(np.isfinite(ratio), ratio, np.nan)


def _bootstrap(
    sums: np.ndarray, weights: np.ndarray, level: float, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from scipy.stats import bootstrap

    generator: Any = {"random_state": np.random.default_rng(seed)}  # "rng" from SciPy 1.15 on
    drawn = bootstrap(
        (sums, weights),
        _ratio,
        paired=True,
        vectorized=True,
        axis=-1,
        n_resamples=n_resamples,
        batch=max(1, 2_000_000 // sums.size),
        confidence_level=level,
        method="percentile",
        **generator,
    )
    size = np.nan_to_num(np.abs(drawn.bootstrap_distribution), nan=-1.0)  # [site, resample]
    wins = np.bincount(size.argmax(0), minlength=len(sums)) / size.shape[1]
    return drawn.confidence_interval.low, drawn.confidence_interval.high, wins
