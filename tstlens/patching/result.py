"""What a sweep returns: one value per pair and site, with the two runs it lies between."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.arguments import Amount, Count, checked
from tstlens.effects import Labelled, strongest
from tstlens.errors import ArgumentError, UnknownAxisError
from tstlens.metrics import ANY, Better

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.data import Pairs
    from tstlens.model import HookedTST
    from tstlens.patching.together import TogetherResult

_SMALL = 1e-6  # a clean-corrupted gap below this cannot be divided by


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult(Labelled):
    """The metric of the patched run for every pair and every site of a grid.

    Args:
        values: [pair, *axes], the metric with the site replaced.
        axes: names of the axes of ``values``; ``"pair"`` first unless it was averaged over.
        coords: for every axis what its entries are (layer numbers, positions, slices).
        baseline: [pair], the metric of the corrupted run.
        clean: [pair], the metric of the clean run.
        metric: name of the metric.
        unit: its unit: ``"probability"``, ``"nats"``, ``"logit"``, ``"squared units"``.
        site: what was replaced.
        source: what it was replaced by.
        time_cells: first and one-past-last sample that each position stands for, or None.
        positions_are: what entries of the axis ``pos`` are: ``"time"`` (a patch, a step), or
            ``"channel"`` in models whose tokens are channels, where position c is channel c.
        n_pairs: pairs that the values come from.
        made: how: model, sizes, method.
        effects: like ``values``, what :meth:`effect` gives where it is known better than as the
            difference of two metrics (gradients, means over pairs); None for that difference.
        rounding: [pair], the size below which a difference of two runs' metrics is rounding; None
            where effects are as exact as their own size.
        better: which direction of the metric is an improvement; None where that is not known.
        range: smallest and largest value that the metric can have.
        times: when each sample was taken, where all pairs share that (one window with dates).
    """

    values: Float[Tensor, "*axes"]
    axes: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    baseline: Float[Tensor, "*pair"]
    clean: Float[Tensor, "*pair"]
    metric: str
    unit: str
    site: str
    source: str = "clean"
    time_cells: tuple[tuple[int, int], ...] | None = None
    positions_are: str = "time"
    n_pairs: int = 1
    made: dict[str, Any] = field(default_factory=dict)
    effects: Float[Tensor, "*axes"] | None = None
    rounding: Float[Tensor, "*pair"] | None = None
    better: Better | None = None
    range: tuple[float, float] = ANY
    times: tuple[str, ...] | None = None

    ALONG: ClassVar = {
        "values": None,
        "effects": None,
        **dict.fromkeys(("baseline", "clean", "rounding"), ("pair",)),
    }

    def __post_init__(self) -> None:
        if self.effects is None:
            return
        value = self.spread(self.baseline, "pair") + self.effects
        step = 64 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        close = (self.values - value).abs() <= step * (self.values.abs() + value.abs()).max()
        if self.effects.shape != self.values.shape or not (close | value.isnan()).all():
            raise ArgumentError(
                "expected values to be baseline + effects, got others; to replace values give "
                "effects=None with them"
            )

    def effect(self) -> Float[Tensor, "*axes"]:
        """Change of the metric against the corrupted run, in the metric's unit."""
        if self.effects is not None:
            return self.effects
        return self.values - self.spread(self.baseline, "pair")

    def at_rounding(self) -> Bool[Tensor, "*axes"]:
        """Where an effect is not zero and yet no larger than rounding makes it."""
        size = self.effect().abs()
        if self.rounding is None:
            return torch.zeros_like(size, dtype=torch.bool)
        return (size > 0) & (size <= self.spread(self.rounding, "pair"))

    def normalized(self) -> Float[Tensor, "*axes"]:
        """Effect divided by the gap between clean and corrupted run: 0 is no change, 1 restores it.

        Where the gap is below 1e-6 or at rounding the ratio means nothing and is NaN. Ratios of
        pairs with a small gap are large and noisy: average effects, then divide
        (``result.mean("pair")`` does so).
        """
        gap = self.spread(self.clean - self.baseline, "pair")
        small = gap.abs() < _SMALL
        if self.rounding is not None:
            small = small | (gap.abs() <= self.spread(self.rounding, "pair"))
        return torch.where(small, torch.nan, self.effect() / gap)

    @checked
    def mean(self, axis: str = "pair") -> SweepResult:
        """The result averaged over one axis.

        Raises:
            UnknownAxisError: the result has no such axis.
        """
        if axis not in self.axes:
            raise UnknownAxisError(axis, self.axes, "This result has these")
        per_pair = {name: getattr(self, name) for name in ("baseline", "clean", "rounding")}
        if axis == "pair":
            per_pair = {n: None if part is None else part.mean() for n, part in per_pair.items()}
        return replace(
            self,
            values=self.values.mean(self.axes.index(axis)),
            effects=self.effect().mean(self.axes.index(axis)),
            axes=tuple(name for name in self.axes if name != axis),
            coords={name: entries for name, entries in self.coords.items() if name != axis},
            **per_pair,
        )

    def named(self) -> SweepResult:
        """The result as figures show it: ``pos`` is called ``channel`` where positions are."""
        if self.positions_are != "channel" or "pos" not in self.axes:
            return self
        axes = tuple("channel" if axis == "pos" else axis for axis in self.axes)
        coords = dict(zip(axes, (self.coords[axis] for axis in self.axes), strict=True))
        return replace(self, axes=axes, coords=coords)

    def std_error(self) -> Float[Tensor, "*axes"]:
        """Standard error of the mean effect over pairs, [*axes without pair]."""
        if "pair" not in self.axes:
            raise UnknownAxisError("pair", self.axes, "Take it before averaging over pairs")
        return self.effect().std(0, correction=1) / len(self.values) ** 0.5

    @checked
    def top(self, n: Count = 5) -> pd.DataFrame:
        """The ``n`` sites whose mean effect is largest in size, strongest first."""
        result = self.mean("pair") if "pair" in self.axes else self
        return strongest(result.to_dataframe(), "effect", n)

    @checked
    def together(
        self,
        model: HookedTST,
        pairs: Pairs,
        ks: Sequence[int] = builtins.range(1, 11),  # a field is called range
        n_random: Amount = 20,
        **options: Any,
    ) -> TogetherResult:
        """The strongest sites patched together, beside random sites as many.

        The strongest are those whose mean effect moves the metric furthest towards the clean run.
        Each is set to what it was in the source's own run. Sites chosen on these very pairs look
        better than they are: sweep some pairs, and give others here.

        Args:
            model: the model.
            pairs: the pairs of the sweep, or others.
            ks: how many sites at once; numbers above all that were swept are left out.
            n_random: random orders of all sites swept, whose first k are patched too.
            **options: ``metric`` (for these pairs; the sweep's own where None), ``source`` (the
                sweep's own where None), ``reference`` and ``reference_mask`` (for
                ``source="mean"``), ``seed`` (of the random orders), ``memory_mb`` and ``progress``
                as in :func:`~tstlens.patching.sweep`.

        Returns:
            A sweep over ("pair", "k") with the sites in their order, the sum of their single
            effects, and what the random ones do.

        Raises:
            ArgumentError: an ablation, a result over axes of no site, a metric that the pairs do
                not give, or a source that results do not keep.
            UnknownSiteError, UnknownAxisError: a model or a result that does not have these sites.

        Example:
            >>> import torch
            >>> from tstlens import patching
            >>> from tstlens.data import Pairs
            >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
            >>> model = HookedTST(HookedTSTConfig(
            ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
            ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
            >>> pairs = Pairs(*torch.randn(2, 6, 3, 8), torch.arange(6) % 5)
            >>> swept = patching.sweep(model, pairs.clean, pairs.corrupted, "z",
            ...     ("layer", "head"), patching.log_prob(pairs.target), progress=False)
            >>> found = swept.together(model, pairs, ks=(1, 3, 8), progress=False)
            >>> found.effect().shape, found.random.shape, len(found.order)
            (torch.Size([6, 3]), torch.Size([20, 6, 3]), 8)
        """
        from tstlens.patching.together import together

        return together(self, model, pairs, ks, n_random, **options)

    def columns(self) -> dict[str, Any]:
        """Value, baseline, clean, effect, normalized; of an exact sweep also ``at_rounding``."""
        columns = {
            "value": self.values,
            "baseline": self.spread(self.baseline, "pair"),
            "clean": self.spread(self.clean, "pair"),
            "effect": self.effect(),
            "normalized": self.normalized(),
        }
        return columns if self.rounding is None else {**columns, "at_rounding": self.at_rounding()}

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: a column per axis, then value, baseline, clean, effect, normalized.

        ``at_rounding`` says of an exact sweep's effects which of them are no more than rounding.

        Where positions are channels, a column ``channel`` beside ``pos`` says which.
        """
        frame = super().to_dataframe()
        if self.named() is not self:
            frame.insert(list(frame.columns).index("pos") + 1, "channel", frame["pos"])
        return frame

    def __repr__(self) -> str:
        runs = [f"{float(run.mean()):.4g}" for run in (self.baseline, self.clean)]
        return (
            f"{type(self).__name__}({self.site} [{self.shape_text()}], {self.metric}: corrupted "
            f"{runs[0]} -> clean {runs[1]})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class AblationResult(SweepResult):
    """A :class:`SweepResult` whose pairs are series: ``baseline`` is the unablated metric.

    ``effect()`` is what ablating does to the metric (negative where the model needs the component
    for a metric that is better when larger). There is no second run, so ``clean`` repeats the
    baseline and ``normalized()`` is NaN.
    """

    def __repr__(self) -> str:
        return (
            f"AblationResult({self.site} [{self.shape_text()}] replaced by {self.source}, "
            f"{self.metric}: unablated {float(self.baseline.mean()):.4g})"
        )
