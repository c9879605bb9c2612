"""Statistics over pairs: effects with intervals, tests, false discovery rates and stability.

Pairs that share a corrupted series are not independent, so whole *clusters* of pairs are drawn,
flipped and split. Everything here answers "had other series of this kind been picked?"; nothing
here covers another training seed of the model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import checked, shown
from tstlens.errors import ArgumentError
from tstlens.metrics import Better
from tstlens.patching.result import SweepResult
from tstlens.results import Result
from tstlens.stats import (
    adjusted,
    by_cluster,
    check_intervals,
    flip_p_values,
    limits_of,
    mean_interval,
)

if TYPE_CHECKING:
    import pandas as pd

Groups = Sequence[Hashable] | Tensor | np.ndarray


@dataclass(frozen=True)
class Summary(Result):
    """Mean effect per class and site, with interval, p and q.

    Args:
        effect: [class, *axes], mean effect over the pairs of a class, in ``unit``.
        low: lower end of the interval; NaN where there are fewer than 5 clusters, or none of them
            has an effect.
        high: upper end.
        p: sign-flip permutation p-value, two-sided; NaN, as all else, where an effect is.
        q: p adjusted by Benjamini and Hochberg over all classes and sites of this table.
        axes: ``"class"`` first, then the sweep's.
        coords: what the entries of every axis are; class ``"all"`` where there is no ``by``.
        n_pairs: [class] pairs.
        n_clusters: [class] independent series among them.
        level: coverage of the intervals.
        metric: name of the metric.
        unit: its unit.
        site: what was replaced.
        beyond_null: share of null pairs whose effect at this site is smaller in size than the mean
            effect here; None without a null map.
        time_cells: samples of every position, or None.
        made: how.
        rounding: [class], the size below which a mean effect is rounding; None where effects are
            as exact as their own size.
        better: which direction of the metric is an improvement, if one is.
    """

    effect: Float[np.ndarray, "*class_and_axes"]
    low: Float[np.ndarray, "*class_and_axes"]
    high: Float[np.ndarray, "*class_and_axes"]
    p: Float[np.ndarray, "*class_and_axes"]
    q: Float[np.ndarray, "*class_and_axes"]
    axes: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    n_pairs: tuple[int, ...]
    n_clusters: tuple[int, ...]
    level: float
    metric: str
    unit: str
    site: str
    beyond_null: Float[np.ndarray, "*class_and_axes"] | None = None
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    rounding: Float[np.ndarray, " class"] | None = None
    better: Better | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per class and site: effect, low, high, p, q, n_pairs, n_clusters."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.coords[axis] for axis in self.axes], names=list(self.axes)
        )
        names = ("effect", "low", "high", "p", "q")
        columns = {name: getattr(self, name).ravel() for name in names}
        if self.beyond_null is not None:
            columns["beyond_null"] = self.beyond_null.ravel()
        per_class = self.effect[0].size
        columns["n_pairs"] = np.repeat(self.n_pairs, per_class)
        columns["n_clusters"] = np.repeat(self.n_clusters, per_class)
        return pd.DataFrame(columns, index=index).reset_index()

    @checked
    def discoveries(self, q: float = 0.05) -> pd.DataFrame:
        """Rows with a q-value of at most ``q``, largest effect first.

        Among them, about this share is expected to be false.
        """
        found = self.to_dataframe().query("q <= @q")
        strongest = found.sort_values("effect", key=abs, ascending=False, kind="stable")
        return strongest.reset_index(drop=True)

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis}={len(self.coords[axis])}" for axis in self.axes)
        return (
            f"Summary({self.site} [{shape}], {self.metric}, {sum(self.n_pairs)} pairs, "
            f"{int((self.q <= 0.05).sum())} of {self.q.size} with q <= 0.05)"
        )


@checked
def summary(
    result: SweepResult,
    by: Groups | None = None,
    n_boot: int = 2000,
    *,
    cluster: Groups | None = None,
    level: float = 0.95,
    n_flips: int = 10000,
    null: SweepResult | None = None,
    seed: int = 0,
) -> Summary:
    """Effect, interval, p and q of every site, per class.

    The effect is the mean over pairs. Its interval is a bootstrap-t interval between one and three
    times as wide as plain t, whose rule and coverage :func:`tstlens.stats.mean_interval` gives; it
    ends where the metric does (a log-probability cannot pass 0). p comes from flipping the signs
    of whole clusters (all 2^n ways where that is at most ``n_flips``), which asks "is the effect as
    often up as down?"; q is p after Benjamini and Hochberg over the whole table. A site with an
    effect that is not finite is NaN in all of these, and no other site changes.

    What can mislead: with n clusters no p lies below 2 / 2^n, so a class with four misclassified
    series cannot reach 0.05 whatever the effects (and has no interval); the test takes effects to
    be symmetric about zero where there is none; clusters share no *corrupted* series, but pairs of
    one class may still share a clean one; and a small q says "not zero", not "large".

    Args:
        result: a sweep, an attribution or an ablation with its pair axis.
        by: a class per pair (``pairs.target``); None puts all pairs together.
        n_boot: bootstrap resamples.
        cluster: a series per pair (``pairs.corrupted_index``); None takes each pair by itself.
        level: coverage of the intervals.
        n_flips: sign flips.
        null: a :func:`null_map` over the same sites, to compare sizes with.
        seed: of resamples and flips.

    Returns:
        A table [class, *axes] with frame and figure.

    Raises:
        ArgumentError: the result was averaged over pairs, labels of another length, a level
            outside 0 to 1, fewer than 100 resamples or flips, or a null map of other sites.

    Source: Efron and Tibshirani 1993, chapter 12 (bootstrap-t); Winkler et al. 2014 (sign flips);
        Benjamini and Hochberg 1995.

    Example:
        >>> import torch
        >>> from tstlens.patching import SweepResult
        >>> effects = torch.randn(20, 2) * 0.1 + torch.tensor([1.0, 0.0])
        >>> result = SweepResult(effects, ("pair", "layer"), {"pair": tuple(range(20)),
        ...     "layer": (0, 1)}, torch.zeros(20), torch.ones(20), "logit", "logit", "attn_out")
        >>> bool(summary(result).q[0, 0] < 0.01)
        True
    """
    effects = pair_effects(result)
    check_intervals(level, n_boot)
    check_intervals(level, n_flips, "n_flips")
    n_pairs = len(effects)
    classes = labels_of(by, n_pairs, "by") if by is not None else ["all"] * n_pairs
    clusters = labels_of(cluster, n_pairs, "cluster") if cluster is not None else range(n_pairs)
    found = sorted(set(classes), key=lambda one: (str(type(one)), one))
    generator = np.random.default_rng(seed)
    parts, sizes, rounding = [], [], []
    for one in found:
        rows = [row for row, name in enumerate(classes) if name == one]
        sums, counts = by_cluster(effects[rows], [clusters[row] for row in rows])
        mean = sums.sum(0) / counts.sum()
        mean[~np.isfinite(mean)] = np.nan
        ends = mean_interval(
            sums,
            counts,
            level=level,
            n_boot=n_boot,
            seed=generator,
            limits=_effect_limits(result, rows),
        )
        parts.append((mean, *ends, flip_p_values(sums, n_flips, generator)))
        sizes.append((len(rows), len(counts)))
        if result.rounding is not None:
            rounding.append(float(result.rounding[rows].double().mean()))
    shape = (len(found), *result.values.shape[1:])
    effect, low, high, p = (np.stack(part) for part in zip(*parts, strict=True))
    return Summary(
        *(part.reshape(shape) for part in (effect, low, high, p, adjusted(p))),
        axes=("class", *result.axes[1:]),
        coords={"class": tuple(found), **{a: result.coords[a] for a in result.axes[1:]}},
        n_pairs=tuple(size[0] for size in sizes),
        n_clusters=tuple(size[1] for size in sizes),
        level=level,
        metric=result.metric,
        unit=result.unit,
        site=result.site,
        beyond_null=None if null is None else _beyond(effect.reshape(shape), result, null),
        time_cells=result.time_cells,
        made={**result.made, "n_boot": n_boot, "n_flips": n_flips, "seed": seed},
        rounding=np.array(rounding) if rounding else None,
        better=result.better,
    )


def labels_of(given: Groups, n_pairs: int, name: str) -> list[Any]:
    """One label per pair as plain values.

    Raises:
        ArgumentError: another length.
    """
    labels = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
    if len(labels) != n_pairs or any(isinstance(label, list) for label in labels):
        raise ArgumentError(
            f"expected one entry of {name} per pair [{n_pairs}], got "
            f"{shown(given) if len(labels) == n_pairs else len(labels)}"
        )
    return labels


def pair_effects(result: SweepResult) -> np.ndarray:
    """Effects as [pair, site], in double precision."""
    if "pair" not in result.axes:
        raise ArgumentError("expected a result with its pair axis; it was averaged over before")
    return (
        result.effect().detach().double().cpu().flatten(1).numpy().reshape(len(result.values), -1)
    )


def _effect_limits(result: SweepResult, rows: list[int]) -> tuple[float, float]:
    """What a mean effect can be at most, given what the corrupted runs gave."""
    baseline, values = (
        part[rows].detach().double().cpu().numpy() for part in (result.baseline, result.values)
    )
    low, high = limits_of(result.unit, baseline, values[np.isfinite(values)], known=result.range)
    return low - baseline.mean(), high - baseline.mean()


def _beyond(effect: np.ndarray, result: SweepResult, null: SweepResult) -> np.ndarray:
    same = null.axes == result.axes and all(
        null.coords[axis] == result.coords[axis] for axis in result.axes[1:]
    )
    if not same or null.metric != result.metric:
        raise ArgumentError(
            f"expected a null map over the same sites and metric, got {null!r} beside {result!r}"
        )
    size = np.abs(pair_effects(null)).reshape(null.values.shape)
    return (size[None] < np.abs(effect)[:, None]).mean(1)
