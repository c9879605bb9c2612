"""Agreement of an attribution with causal patching of the same inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from tstlens.errors import ArgumentError
from tstlens.probing.input_attribution import InputAttribution
from tstlens.results import TableResult
from tstlens.stats import check_intervals, mean_interval, rank_correlation

_FEWEST_SITES = 3  # ranks of fewer sites say nothing


@dataclass(frozen=True, repr=False)
class AttributionAgreement(TableResult):
    """Rank correlation of attributions and causal effects, series by series.

    Args:
        spearman: [batch], NaN where either map is constant.
        mean: their mean.
        low: lower end of the interval of the mean over series; NaN below 5 series. See
            :func:`tstlens.stats.mean_interval`.
        high: upper end.
        attribution: [batch, site], NaN where a site is padding.
        effect: [batch, site], the causal effects.
        axes: axes of the sites.
        coords: what the entries of every axis are.
        method: of the attribution.
        measure: what was attributed.
        metric: what the effects are changes of.
        site: what was patched.
        absolute: whether sizes were ranked instead of signed values.
        level: coverage of the interval.
        made: how both were made.
    """

    spearman: Float[np.ndarray, " batch"]
    mean: float
    low: float
    high: float
    attribution: Float[np.ndarray, "batch site"]
    effect: Float[np.ndarray, "batch site"]
    axes: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    method: str
    measure: str
    metric: str
    site: str
    absolute: bool = False
    level: float = 0.95
    made: dict[str, Any] = field(default_factory=dict)

    def _rows(self) -> dict[str, Any]:
        return {"series": range(len(self.spearman)), "spearman": self.spearman}

    def __repr__(self) -> str:
        return (
            f"AttributionAgreement({self.method} and patching {self.site} over "
            f"{' x '.join(self.axes)}: Spearman {self.mean:.3f} "
            f"[{self.low:.3f}, {self.high:.3f}], {len(self.spearman)} series)"
        )


def agreement(
    attribution: InputAttribution,
    sweep: Any,
    *,
    absolute: bool = False,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> AttributionAgreement:
    """Do the attributions rank the inputs as replacing them does?

    The sweep replaces each unit of the *baseline* series by that of the explained one and keeps
    everything else (``patching.sweep(model, explained, baseline, ...)`` at ``Site("series")``), or
    replaces a position of the stream. So the attribution must have been made with the sweep's
    corrupted series as its baseline, and with the class of its metric. Of a sweep the other way
    round (units of the baseline put into the explained series) the effects have the opposite sign,
    and -1 is perfect agreement.

    What can mislead: one position replaced at a time is itself a choice; where units share what
    they say, patching one of them shows nothing, and low agreement is not the attribution's fault.
    Ranks among sites that all do next to nothing are noise.

    Args:
        attribution: of the same series, in the same order.
        sweep: any result with ``axes`` (``"pair"`` first), ``coords`` and ``effect()``, such as a
            :class:`tstlens.patching.SweepResult`. Its other axes are of channel, time and pos.
            Attributions are added up over the axes that it lacks.
        absolute: rank sizes instead of signed values.
        level: coverage of the interval.
        n_boot: bootstrap resamples.
        seed: of the resamples.

    Returns:
        Spearman's correlation per series, with its mean and interval.

    Raises:
        ArgumentError: other axes, entries or series than the attribution's.
    """
    check_intervals(level, n_boot)
    axes, effects, coords = _effects(attribution, sweep)
    values = attribution.values.double().numpy()
    unit = attribution.axes[2]
    if "pos" in axes and unit == "time":
        values = _by_position(values, sweep)
        unit = "pos"
    names = ("channel", unit)
    foreign = [axis for axis in axes if axis not in names]
    if foreign:
        raise ArgumentError(
            f"expected a sweep over {' and '.join(names)} like the attribution, got {list(axes)}; "
            "attribute with unit='time' to compare with a sweep over time"
        )
    gone = tuple(1 + number for number, name in enumerate(names) if name not in axes)
    padded = np.isnan(values).all(gone) if gone else np.isnan(values)
    values = np.where(padded, np.nan, np.nansum(values, gone)) if gone else values
    for number, name in enumerate([name for name in names if name in axes], start=1):
        size, entries = values.shape[number], coords[name]
        if not all(isinstance(entry, int) and 0 <= entry < size for entry in entries):
            raise ArgumentError(f"expected {name} entries in 0..{size - 1}, got {entries}")
        values = np.take(values, entries, axis=number)
    in_order = [axes.index(name) + 1 for name in names if name in axes]
    effects = effects.transpose(0, *in_order)
    ours, theirs = (part.reshape(len(part), -1) for part in (values, effects))
    if absolute:
        ours, theirs = np.abs(ours), np.abs(theirs)
    enough = (np.isfinite(ours) & np.isfinite(theirs)).sum(1) >= _FEWEST_SITES
    each = np.array([rank_correlation(a, b) for a, b in zip(ours, theirs, strict=True)])
    each = np.where(enough, each, np.nan)
    known = each[np.isfinite(each)]
    ends = mean_interval(known[:, None], level=level, n_boot=n_boot, seed=seed, limits=(-1, 1))
    low, high = (float(end[0]) for end in ends)
    return AttributionAgreement(
        each,
        float(known.mean()) if len(known) else float("nan"),
        low,
        high,
        ours,
        theirs,
        tuple(name for name in names if name in axes),
        coords,
        attribution.method,
        attribution.measure,
        str(getattr(sweep, "metric", "effect")),
        str(getattr(sweep, "site", "the input")),
        absolute,
        level,
        {"attribution": attribution.made, "sweep": getattr(sweep, "made", {})},
    )


def _effects(
    attribution: InputAttribution, sweep: Any
) -> tuple[tuple[str, ...], np.ndarray, dict[str, tuple[Any, ...]]]:
    """The sweep's own axes, its effects [pair, *axes] and their coords."""
    axes, effect = getattr(sweep, "axes", None), getattr(sweep, "effect", None)
    if not axes or not callable(effect) or not hasattr(sweep, "coords"):
        raise ArgumentError(
            "expected a sweep with axes, coords and effect(), such as patching.sweep(...) gives, "
            f"got {type(sweep).__name__}"
        )
    n = len(attribution.values)
    values: Any = effect()
    if axes[0] != "pair" or len(values) != n:
        raise ArgumentError(
            f"expected a sweep with its pair axis over the same {n} series, got "
            f"{dict(zip(axes, values.shape, strict=True))}"
        )
    rest = tuple(axes[1:])
    if not rest:
        raise ArgumentError("expected a sweep over channel, time or pos, got one over pairs only")
    effects = values.detach().double().cpu().numpy()
    return rest, effects, {axis: tuple(sweep.coords[axis]) for axis in rest}


def _by_position(values: np.ndarray, sweep: Any) -> np.ndarray:
    """Attributions per sample added up over the samples of the sweep's positions."""
    cells = getattr(sweep, "time_cells", None)
    if cells is None:
        raise ArgumentError(
            "the sweep's positions have no known samples; attribute with unit='patch' instead"
        )
    parts = [values[:, :, start:stop] for start, stop in cells]
    return np.stack(
        [
            np.where(np.isnan(part).all(2) if part.shape[2] else False, np.nan, np.nansum(part, 2))
            for part in parts
        ],
        axis=2,
    )
