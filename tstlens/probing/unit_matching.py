"""Which neurons of two models are the same: across training seeds, sizes and layers.

Two trainings may learn the same features in another order. Here every neuron of one model gets at
most one of the other, so that the correlations of the pairs add up to the most that is possible.

What can mislead: neurons that follow the position in the series correlate in any two models, and
the best of many random partners is never uncorrelated; so judge by the distance to the control. A
feature that is spread over several neurons of one model has no partner (see
:func:`tstlens.probing.similarity`, which does not depend on the axes).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tstlens.arguments import Count, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.model.activations import Activations, Pool, activations
from tstlens.probing.layer_similarity import Rows
from tstlens.results import TableResult
from tstlens.stats import matched


@dataclass(frozen=True, eq=False, repr=False)
class UnitMatch(TableResult):
    """One-to-one pairs of neurons of two models, most alike first.

    Args:
        unit_a: [match] of the first model's hook point (with heads: all of them side by side).
        unit_b: [match] its partner in the second.
        correlation: [match] Pearson's, over the rows.
        best_a: [unit] the largest correlation of every neuron of the first with *any* of the
            second (several may choose the same); NaN for neurons that never change.
        chance: [match] correlations of the same matching with the second model's series in
            another order, largest first.
        hooks: full names of the two hook points.
        names: of the two models.
        n_rows: rows that were correlated.
        made: how.
    """

    unit_a: Int[np.ndarray, " match"]
    unit_b: Int[np.ndarray, " match"]
    correlation: Float[np.ndarray, " match"]
    best_a: Float[np.ndarray, " unit"]
    chance: Float[np.ndarray, " match"]
    hooks: tuple[str, str]
    names: tuple[str, str]
    n_rows: int
    made: dict[str, Any] = field(default_factory=dict)

    def _rows(self) -> dict[str, Any]:
        names = ("unit_a", "unit_b", "correlation", "chance")
        return {name: getattr(self, name) for name in names}

    def share(self, above: float = 0.7) -> float:
        """Share of the pairs whose correlation is above a threshold."""
        return float((self.correlation > above).mean())

    def __repr__(self) -> str:
        return (
            f"UnitMatch({len(self.correlation)} pairs of {self.hooks[0]} and {self.hooks[1]}: "
            f"mean {self.correlation.mean():.3f}, {self.share():.0%} above 0.7; series in another "
            f"order: mean {self.chance.mean():.3f})"
        )


@checked
def match_units(
    model_a: HookedTST,
    model_b: HookedTST,
    data: TimeSeriesData,
    hook: str = "blocks.0.mlp.hook_post",
    hook_b: str | None = None,
    *,
    rows: Rows = "positions",
    pool: Pool = "mean",
    seed: Seed = 0,
    batch_size: Count = 128,
    progress: bool = False,
) -> UnitMatch:
    """Match the neurons of two models one to one by what they do on the same series.

    Args:
        model_a: a model.
        model_b: another one that reads the same series (or the same one, for another layer).
        data: the series; padded positions take no part.
        hook: hook point of the first, a full name.
        hook_b: of the second; None for the same name.
        rows: correlate over ``"positions"``, or ``"series"`` pooled over theirs, which models
            that cut series differently have in common.
        pool: of rows="series".
        seed: of the other order of the series, which the control is.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        The pairs, most alike first. Neurons that never change are left out.

    Raises:
        UnknownHookError, HookError: a hook point that does not exist or cannot fire.
        SeriesShapeError: models whose positions differ, with rows="positions".
        ArgumentError: fewer than two rows or series, a short name that stands for several hook
            points, or a hook point without a neuron that changes.

    Source: Li et al. 2015, "Convergent learning" (arXiv 1511.07543); Kuhn 1955 (Hungarian method).

    Example:
        >>> from tstlens import HookedTST, load_dataset
        >>> model, data = HookedTST.from_pretrained("gunpoint"), load_dataset("GunPoint")
        >>> found = match_units(model, model, data[:20])
        >>> bool((found.unit_a == found.unit_b).all())
        True
    """
    first, second = (
        _one(activations(model, data, name, batch_size=batch_size, progress=progress), name)
        for model, name in ((model_a, hook), (model_b, hook_b or hook))
    )
    if len(data) < 2:
        raise ArgumentError("expected at least two series, of which the control changes the order")
    order = np.random.default_rng(seed).permutation(len(data))
    if (order == np.arange(len(data))).all():
        order = np.roll(order, 1)
    a, b = _rows(first, second, rows, pool, np.arange(len(data)))
    correlation, kept_a, kept_b = _correlations(a, b)
    if not correlation.size:
        raise ArgumentError("expected neurons that change over these series, got none in one model")
    pairs_a, pairs_b = matched(correlation)
    shuffled, *_ = _correlations(*_rows(first, second, rows, pool, order))
    best = np.full(a.shape[1], np.nan)
    best[kept_a] = correlation.max(1)
    return UnitMatch(
        unit_a=kept_a[pairs_a],
        unit_b=kept_b[pairs_b],
        correlation=correlation[pairs_a, pairs_b],
        best_a=best,
        chance=shuffled[matched(shuffled)][: len(pairs_a)],
        hooks=(first.hook, second.hook),
        names=(model_a.cfg.model_name, model_b.cfg.model_name),
        n_rows=len(a),
        made={"rows": rows, "pool": pool if rows == "series" else None, "seed": seed},
    )


def _one(found: dict[str, Activations], name: str) -> Activations:
    if len(found) != 1:
        raise ArgumentError(f"expected one hook point, got {name!r}, which is {', '.join(found)}")
    return next(iter(found.values()))


def _rows(
    first: Activations, second: Activations, rows: Rows, pool: Pool, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What is correlated, [row, unit] of both, the second's series in this order."""
    if rows == "series":
        a, b = (one.joined().pooled(pool)[:, 0] for one in (first, second))
        return a, b[order]
    if first.values.shape[:3] != second.values.shape[:3]:
        raise SeriesShapeError(
            f"expected models with the same positions, got {first!r} and {second!r}; "
            "rows='series' compares what is pooled over them"
        )
    seen = first.observed & second.observed[order]
    return first.values[seen], second.values[order][seen]


def _correlations(
    a: Float[np.ndarray, "row a"], b: Float[np.ndarray, "row b"]
) -> tuple[Float[np.ndarray, "kept_a kept_b"], np.ndarray, np.ndarray]:
    """Pearson's correlations of the units that change, and which those are."""
    if len(a) < 2:
        raise ArgumentError(f"expected at least two rows to correlate over, got {len(a)}")
    kept, standard = [], []
    for values in (a, b):
        values = values.astype(np.float64)
        kept.append(np.flatnonzero(np.ptp(values, axis=0) > 0))
        centred = values[:, kept[-1]] - values[:, kept[-1]].mean(0)
        standard.append(centred / np.linalg.norm(centred, axis=0))
    return standard[0].T @ standard[1], kept[0], kept[1]
