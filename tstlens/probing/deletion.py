"""Deletion and insertion: does the output follow the order that an attribution gives?

Prediction difference: what the output loses with the units that an attribution ranks first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import (
    Count,
    Draws,
    Seed,
    Share,
    check_fields,
    checked,
    configured,
    shown,
)
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.probing.input_attribution import (
    Cells,
    InputAttribution,
    Unit,
    cells_of,
    make_baseline,
    seen_units,
    spread,
    unit_of_sample,
)
from tstlens.probing.measures import measured
from tstlens.probing.steering import series_and_mask
from tstlens.results import TableResult
from tstlens.run import evaluating
from tstlens.stats import limits_of, mean_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class DeletionInsertion(TableResult):
    """The measure while units are replaced by the baseline, or put back, in an order.

    Args:
        fractions: shares of a series' observed units that were replaced (or put back).
        deletion: [series, fraction], the measure with the first units of the order replaced.
        insertion: [series, fraction], the measure of the baseline with the first units put back.
        random_deletion: [order, series, fraction], the same in random orders.
        random_insertion: [order, series, fraction].
        measure: name of the measure.
        measure_unit: its unit.
        method: what made the order.
        baseline_name: what units were replaced by.
        unit: ``"patch"`` or ``"time"``.
        level: coverage of the intervals.
        made: how.
    """

    fractions: tuple[float, ...]
    deletion: Float[np.ndarray, "series fraction"]
    insertion: Float[np.ndarray, "series fraction"]
    random_deletion: Float[np.ndarray, "order series fraction"]
    random_insertion: Float[np.ndarray, "order series fraction"]
    measure: str
    measure_unit: str
    method: str
    baseline_name: str
    unit: str
    level: float = 0.95
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def deletion_area(self) -> float:
        """Mean area under the deletion curve, over shares 0 to 1; smaller is better."""
        return float(_areas(self.fractions, self.deletion).mean())

    @property
    def insertion_area(self) -> float:
        """Mean area under the insertion curve; larger is better."""
        return float(_areas(self.fractions, self.insertion).mean())

    @checked
    def intervals(self, kind: Literal["deletion", "insertion"]) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval of the mean curve at every share; NaN below 5 series.

        Args:
            kind: ``"deletion"`` or ``"insertion"``.
        """
        return self._ends(getattr(self, kind))

    def _rows(self) -> list[dict[str, Any]]:
        """One for deletion, one for insertion: areas, random areas, differences, intervals.

        ``better`` is how much better than random order: random less own area for deletion, own
        less random for insertion, paired by series, with the ends of its interval.
        """
        rows = []
        for kind, sign in (("deletion", -1.0), ("insertion", 1.0)):
            own = _areas(self.fractions, getattr(self, kind))
            random = _areas(self.fractions, getattr(self, f"random_{kind}"))
            low, high = self._ends(own[:, None])
            better = sign * (own - random.mean(0))
            better_low, better_high = self._ends(better[:, None], change=True)
            rows.append(
                {
                    "curve": kind,
                    "area": own.mean(),
                    "low": low[0],
                    "high": high[0],
                    "random_area": random.mean(),
                    "better": better.mean(),
                    "better_low": better_low[0],
                    "better_high": better_high[0],
                    "n_series": len(own),
                    "n_random": len(random),
                }
            )
        return rows

    def curves(self) -> pd.DataFrame:
        """One row per share: mean deletion and insertion, own and random."""
        import pandas as pd

        return pd.DataFrame(
            {
                "fraction": self.fractions,
                "deletion": self.deletion.mean(0),
                "insertion": self.insertion.mean(0),
                "random_deletion": self.random_deletion.mean((0, 1)),
                "random_insertion": self.random_insertion.mean((0, 1)),
            }
        )

    def _ends(self, values: np.ndarray, change: bool = False) -> tuple[np.ndarray, np.ndarray]:
        low, high = limits_of(self.measure_unit, self.deletion, self.insertion)
        return mean_interval(
            values,
            level=self.level,
            n_boot=self.made.get("n_boot", 2000),
            seed=self.made.get("seed", 0),
            limits=(low - high, high - low) if change else (low, high),
        )

    def __repr__(self) -> str:
        random = [
            float(_areas(self.fractions, part).mean())
            for part in (self.random_deletion, self.random_insertion)
        ]
        return (
            f"DeletionInsertion({self.method}, {self.measure}: deletion area "
            f"{self.deletion_area:.3f} (random {random[0]:.3f}), insertion area "
            f"{self.insertion_area:.3f} (random {random[1]:.3f}), {len(self.deletion)} series)"
        )


def _areas(fractions: Sequence[float], curves: np.ndarray) -> np.ndarray:
    """Area under each curve, by trapezoids."""
    return np.asarray(np.trapezoid(curves, np.asarray(fractions), axis=-1))


@dataclass(frozen=True)
class DeletionConfig:
    """How curves are drawn; every field is also a keyword of :func:`deletion_insertion`.

    Args:
        n_points: points of the curves beside 0.
        n_random: random orders per series.
        level: coverage of the intervals.
        n_boot: bootstrap resamples.
        seed: of random orders and resamples.
        rows_per_pass: perturbed series in one forward pass.
        progress: show a progress bar.
    """

    n_points: Annotated[int, Ge(2)] = 20
    n_random: Count = 10
    level: Share = 0.95
    n_boot: Draws = 2000
    seed: Seed = 0
    rows_per_pass: Count = 1024
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


@checked
@configured(DeletionConfig)
def deletion_insertion(
    model: HookedTST,
    series: Tensor | TimeSeriesData,
    target: Tensor | int | None,
    attribution: InputAttribution | Tensor,
    *,
    baseline: str | Tensor | None = None,
    background: Tensor | TimeSeriesData | None = None,
    unit: Unit | None = None,
    measure: str | Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    config: DeletionConfig | None = None,
    **settings: Any,
) -> DeletionInsertion:
    """How fast the output falls as units are deleted in an attribution's order, and rises as they
    are put into the baseline, beside random orders.

    Answers "does this attribution know which inputs matter?", model against model: no human
    judgement enters. Units go from the most positive attribution to the most negative; padded units
    take no part. Intervals are over series (bootstrap).

    What can mislead: half-deleted series are no data that the model was trained on, so the curves
    also show how it fails on such; and both curves reward attributions with the same baseline as
    the test. Compare with random orders, and between methods with one baseline.

    Args:
        model: the model.
        series: [batch, channel, time], or data with their mask: those of the attribution.
        target: the class that is measured, one per series or one for all; None for forecasters.
        attribution: of :func:`attribute`, or any scores [batch, channel, unit].
        baseline: what deleted units become: as for :func:`attribute`. None takes the baseline of
            the attribution; a tensor of scores has none, so it must be given then.
        background: series that ``"mean"`` is taken from.
        unit: of a tensor of scores: ``"patch"`` or ``"time"``.
        measure: ``"probability"`` (None, of a classifier) or another; see :func:`attribute`.
        mask: bool [batch, time], True where observed.
        config: how; None for the defaults.
        **settings: fields of :class:`DeletionConfig`: ``n_points``, ``n_random``, ``level``,
            ``n_boot``, ``seed``, ``rows_per_pass`` and ``progress``.

    Returns:
        Curves with areas, frame and figure.

    Raises:
        SeriesShapeError: an attribution of other series or units.
        ArgumentError: no baseline for a tensor of scores, or NaN in observed units.

    Source: Petsiuk et al. 2018 (RISE, arXiv 1806.07421); Samek et al. 2017 for the random order.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> series = torch.randn(2, 12, 25)
        >>> result = probing.deletion_insertion(model, series, 3, torch.randn(2, 12, 25),
        ...     baseline="zero", unit="patch", n_points=4, n_random=1, progress=False)
        >>> result.fractions
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    series, mask = series_and_mask(series, mask)
    model.check_series(series, mask)
    metric = measured(model, measure, target, len(series), "probability")
    config = config or DeletionConfig()
    scores, cells, own_unit, method = scores_of(model, attribution, series, unit)
    base, name = _baseline(attribution, baseline, series, mask, background)
    seen = seen_units(mask, cells, series)
    _check_scores(scores, seen)
    fractions = tuple(float(x) for x in np.linspace(0, 1, config.n_points + 1))
    generator = torch.Generator().manual_seed(config.seed)
    own = ranks(scores, seen)
    shuffled = [
        ranks(torch.rand(scores.shape, generator=generator, dtype=torch.float64), seen)
        for _ in range(config.n_random)
    ]
    run = _Run(model, metric, series, base, mask, cells, seen, config.rows_per_pass)
    ends = run.curve(own, (0.0, 1.0))

    def deleted(rank: Tensor) -> np.ndarray:
        inner = run.curve(rank, fractions[1:-1])
        bar.update()
        return np.concatenate([ends[:, :1], inner, ends[:, 1:]], 1)

    bar = tqdm(
        total=2 + config.n_random,
        desc="deletion",
        unit="order",
        disable=not config.progress,
        delay=1,
    )
    with evaluating(model), bar:
        deletion = deleted(own)
        # Putting the first units back is deleting in the opposite order, read from its end.
        insertion = deleted(run.reversed(own))[:, ::-1]
        random = np.stack([deleted(rank) for rank in shuffled])
    return DeletionInsertion(
        fractions,
        deletion,
        insertion,
        random,
        random[:, :, ::-1],  # the opposite of a random order is one as well
        metric.name,
        metric.unit,
        method,
        name,
        own_unit,
        config.level,
        {
            "n_random": config.n_random,
            "n_boot": config.n_boot,
            "seed": config.seed,
            "model": model.cfg.model_name,
        },
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """Perturbed series through the model."""

    model: HookedTST
    metric: Metric
    series: Tensor
    baseline: Tensor
    mask: Tensor | None
    cells: Cells
    seen: Tensor
    rows_per_pass: int

    @torch.no_grad()
    def curve(self, rank: Tensor, shares: Sequence[float]) -> Float[np.ndarray, "series share"]:
        """The measure with each share of the units, the first in rank, replaced."""
        device, n_time = self.model.cfg.device, self.series.shape[2]
        loose = _loose(self.cells, n_time)
        counts = self._n_seen()
        per_pass = max(1, self.rows_per_pass // len(shares))
        rows = []
        for start in range(0, len(self.series), per_pass):
            at = slice(start, start + per_pass)
            mixed = []
            for share in shares:
                first = _count(share, counts[at])[:, None, None]
                gone = spread(rank[at] < first, self.cells, n_time)
                gone |= loose & (share == 1.0)
                own, other = self.series[at], self.baseline[at]
                mixed.append(torch.where(gone.to(own.device), other, own))
            mask = None if self.mask is None else self.mask[at].repeat(len(shares), 1).to(device)
            output = self.model(torch.cat(mixed).to(device), mask=mask)
            targets = [target[at].repeat(len(shares)) for target in self.metric.targets]
            values = self.metric.of_rows(output, *targets).double().cpu()
            rows.append(values.view(len(shares), -1).T)
        return torch.cat(rows).numpy()

    def reversed(self, rank: Tensor) -> Tensor:
        """The opposite order; units not seen stay last."""
        last = self._n_seen()[:, None, None] - 1
        return torch.where(self.seen, last - rank, rank)

    def _n_seen(self) -> Tensor:
        return self.seen.flatten(1).sum(1)


def _count(share: float, n: Tensor) -> Tensor:
    """How many of n units a share is; those of a share and of the rest of 1 add up to n."""
    if share > 0.5:
        return n - ((1 - share) * n + 0.5).floor().long()
    return n // 2 if share == 0.5 else (share * n + 0.5).floor().long()


def _loose(cells: Cells, n_time: int) -> Tensor:
    """bool [time], samples of no unit: they are replaced when everything is."""
    return unit_of_sample(cells, n_time) == len(cells)


def _check_scores(scores: Tensor, seen: Tensor) -> None:
    if bool((scores.isnan() & seen).any()):
        raise ArgumentError(
            "expected a score for every observed unit, got NaN; is the mask the same?"
        )


def ranks(scores: Tensor, seen: Tensor) -> Tensor:
    """Place of every unit of a series, the highest score first; units not seen come last."""
    flat = scores.double().masked_fill(~seen, -torch.inf).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view(scores.shape)


def scores_of(
    model: HookedTST, attribution: InputAttribution | Tensor, series: Tensor, unit: Unit | None
) -> tuple[Tensor, Cells, str, str]:
    """Scores of every unit, the units' cells, what a unit is, and the method that gave them."""
    if isinstance(attribution, InputAttribution):
        if unit is not None and unit != attribution.unit:
            raise ArgumentError(
                f"unit={unit!r} was given, but the attribution's is {attribution.unit!r}"
            )
        same = attribution.series.shape == series.shape and torch.equal(
            attribution.series, series.detach().cpu()
        )
        if not same:
            raise SeriesShapeError(
                "expected the series that were attributed, in the same order, got others "
                f"({list(series.shape)}, attributed {list(attribution.series.shape)})"
            )
        return attribution.values, attribution.cells, attribution.unit, attribution.method
    if unit is None:
        raise ArgumentError("a tensor of scores does not say its unit; give unit='patch' or 'time'")
    cells = cells_of(model, series.shape[2], unit)
    expected = (*series.shape[:2], len(cells))
    if tuple(attribution.shape) != expected:
        raise SeriesShapeError(
            f"expected scores [batch, channel, {unit}] {list(expected)}, "
            f"got {list(attribution.shape)}"
        )
    return attribution.detach().cpu(), cells, unit, "scores"


def _baseline(
    attribution: InputAttribution | Tensor,
    baseline: str | Tensor | None,
    series: Tensor,
    mask: Tensor | None,
    background: Tensor | TimeSeriesData | None,
) -> tuple[Tensor, str]:
    if baseline is None:
        if not isinstance(attribution, InputAttribution):
            raise ArgumentError(
                "a tensor of scores has no baseline of its own; give baseline='mean', 'zero' or "
                "series"
            )
        if attribution.made.get("baseline") == "samples":
            raise ArgumentError(
                "the attribution was made against a set of baselines; give the one that deleted "
                "units become: baseline='mean', 'zero' or series"
            )
        return attribution.baseline.to(series), attribution.baseline_name
    made = make_baseline(baseline, series, mask, background)
    if made.many:
        raise ArgumentError("baseline='samples' is a set; deleted units become one: try 'mean'")
    return made.values, made.name


@checked
def prediction_difference(
    model: HookedTST,
    series: Tensor | TimeSeriesData,
    target: Tensor | int | None,
    attribution: InputAttribution | Tensor,
    *,
    n_top: Tensor | int,
    replacement: Tensor,
    unit: Unit | None = None,
    measure: str | Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """How far the output falls when the units that an attribution ranks first are replaced.

    One point of a deletion curve, at a size that is known beforehand: how many units decide, say.
    Units go from the most positive attribution to the most negative; give ``values.abs()`` where
    the sign does not matter. Padded units take no part.

    What can mislead: it rewards whatever breaks the model, so units that merely confuse it count
    as much as those that decide. Put a random order and, where it is known, the true mask beside
    it, and take replacements that the attribution has not seen.

    Args:
        model: the model.
        series: [batch, channel, time], or data with their mask.
        target: the class that is measured, one per series or one for all; None for forecasters.
        attribution: of :func:`attribute`, or any scores [batch, channel, unit].
        n_top: units that are replaced, one number for all or [batch].
        replacement: [batch, channel, time] what they become, or [set, batch, channel, time] for the
            mean over several.
        unit: of a tensor of scores: ``"patch"`` or ``"time"``.
        measure: ``"probability"`` (None, of a classifier) or another; see :func:`attribute`.
        mask: bool [batch, time], True where observed.

    Returns:
        Measure of the series minus measure of the changed series.

    Raises:
        SeriesShapeError: scores, replacements or ``n_top`` of other series.
        ArgumentError: fewer than one unit, or more than a series has; NaN in observed units.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> series = torch.randn(2, 12, 25)
        >>> probing.prediction_difference(model, series, 3, series.abs(), n_top=40,
        ...     replacement=torch.zeros(2, 12, 25), unit="time").shape
        torch.Size([2])
    """
    series, mask = series_and_mask(series, mask)
    model.check_series(series, mask)
    metric = measured(model, measure, target, len(series), "probability")
    scores, cells, _, _ = scores_of(model, attribution, series, unit)
    others = replacement[None] if replacement.ndim == 3 else replacement
    if others.ndim != 4 or not len(others) or others.shape[1:] != series.shape:
        raise SeriesShapeError(
            f"replacement: expected [batch, channel, time] {list(series.shape)}, or a set of "
            f"such, got {list(replacement.shape)}"
        )
    seen = seen_units(mask, cells, series)
    _check_scores(scores, seen)
    counts = torch.as_tensor(n_top).cpu()
    if counts.shape not in ((), (len(series),)) or counts.is_floating_point():
        raise SeriesShapeError(
            f"n_top: expected one integer, or one per series [{len(series)}], got {shown(counts)}"
        )
    counts = counts.expand(len(series))
    most = int((seen.flatten(1).sum(1) - counts).min())
    if int(counts.min()) < 1 or most < 0:
        raise ArgumentError(
            f"n_top: expected from 1 to the observed units of each series (at least "
            f"{int(seen.flatten(1).sum(1).min())}), got {int(counts.min())} to {int(counts.max())}"
        )
    gone = spread(ranks(scores, seen) < counts[:, None, None], cells, series.shape[2])

    def measure_at(changed: Tensor) -> Tensor:
        device = model.cfg.device
        seen_by_model = None if mask is None else mask.to(device)
        output = model(changed.to(device), mask=seen_by_model)
        return metric.of_rows(output, *metric.targets).cpu()

    with evaluating(model), torch.no_grad():
        before = measure_at(series)
        gone = gone.to(series.device) & ~series.isnan()
        falls = [
            before - measure_at(torch.where(gone, other.to(series), series)) for other in others
        ]
    return torch.stack(falls).mean(0)
