"""Dose response: the model's output against the strength of a push, beside random pushes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.model.passes import require_one_pass
from tstlens.probing.directions import Direction, random_directions
from tstlens.probing.measures import Measure, measure_of, targets_of
from tstlens.probing.steering_inputs import evaluating, series_and_mask
from tstlens.results import Result
from tstlens.stats import check_intervals, limits_of, mean_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class DoseResponse(Result):
    """The measure of every series at every strength, for a direction and for random ones.

    Args:
        strengths: in units of ``unit``, ascending, 0 among them (no push).
        values: [series, strength], the measure.
        random: [direction, series, strength], the same along random directions of equal norm.
        low: [strength], lower end of the interval of the mean change against no push, over series;
            NaN below 5 series.
        high: [strength], upper end.
        above_low: [strength], lower end of the interval of the direction's change less the mean
            change of random directions, paired by series.
        above_high: [strength], upper end.
        hook: where it was pushed.
        method: how the direction was made.
        unit: what strength 1 means.
        measure: name of the measure.
        measure_unit: its unit.
        level: coverage of the intervals.
        made: how.
    """

    strengths: tuple[float, ...]
    values: Float[np.ndarray, "series strength"]
    random: Float[np.ndarray, "direction series strength"]
    low: Float[np.ndarray, " strength"]
    high: Float[np.ndarray, " strength"]
    above_low: Float[np.ndarray, " strength"]
    above_high: Float[np.ndarray, " strength"]
    hook: str
    method: str
    unit: str
    measure: str
    measure_unit: str
    level: float = 0.95
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Float[np.ndarray, " strength"]:
        """Mean of the measure over series."""
        return self.values.mean(0)

    @property
    def change(self) -> Float[np.ndarray, " strength"]:
        """Mean change against no push."""
        return self.mean - self.mean[self._none]

    @property
    def random_change(self) -> Float[np.ndarray, "direction strength"]:
        """Mean change of every random direction."""
        means = self.random.mean(1)
        return means - means[:, [self._none]]

    @property
    def monotone(self) -> bool:
        """Whether the mean rises (or falls) from each strength to the next."""
        steps = np.diff(self.mean)
        return bool((steps > 0).all() or (steps < 0).all())

    @property
    def p(self) -> Float[np.ndarray, " strength"]:
        """(1 + random directions whose change is at least as large in size) / (1 + how many).

        With n random directions no p lies below 1 / (n + 1); it is 1 at strength 0.
        """
        larger = np.abs(self.random_change) >= np.abs(self.change)
        return (1 + larger.sum(0)) / (1 + len(self.random))

    @property
    def _none(self) -> int:
        return self.strengths.index(0.0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per strength: mean, change, low, high, random_change, above_*, p."""
        import pandas as pd

        return pd.DataFrame(
            {
                "strength": self.strengths,
                "mean": self.mean,
                "change": self.change,
                "low": self.low,
                "high": self.high,
                "random_change": self.random_change.mean(0),
                "above_low": self.above_low,
                "above_high": self.above_high,
                "p": self.p,
            }
        )

    def __repr__(self) -> str:
        last = int(np.argmax(np.abs(self.strengths)))
        return (
            f"DoseResponse({self.hook}, {self.method}, {self.measure}: {self.mean[self._none]:.3g}"
            f" -> {self.mean[last]:.3g} at {self.strengths[last]:g}, random "
            f"{self.random.mean((0, 1))[last]:.3g}, {'' if self.monotone else 'not '}monotone)"
        )


@checked
@torch.no_grad()
def dose_response(
    model: HookedTST,
    data: Tensor | TimeSeriesData,
    direction: Direction,
    strengths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    *,
    target: int | Tensor | None = None,
    measure: str | Callable[[Tensor], Tensor] | None = None,
    n_random: int = 20,
    pos: int | slice | Sequence[int] | None = None,
    mask: Tensor | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    batch_size: int = 512,
    progress: bool = True,
) -> DoseResponse:
    """How the output answers to pushes of growing strength, beside random pushes of equal norm.

    Answers "does the model use this direction, and how much of it does it take?". Strength 0 is
    always among the doses. Intervals are over series (:func:`tstlens.stats.mean_interval`); p
    compares with the random directions.

    What can mislead: probabilities saturate (take ``"logit"`` too), and large strengths leave what
    the model was trained on, where curves bend or turn. Where a norm follows the hook point the
    push is divided by its own length, so that more strength replaces the activation rather than
    adding to it. Series that the direction was made from answer more strongly: take others.

    Args:
        model: the model.
        data: series [batch, channel, time], or data with their mask.
        direction: from :func:`direction` or :func:`latent_direction`.
        strengths: doses, in the direction's unit.
        target: the class whose probability is measured, or one class per series; None for
            forecasters and measures of your own.
        measure: ``"probability"`` (None, of a classifier), ``"log_probability"``, ``"logit"``,
            ``"mean_forecast"`` (None, of a forecaster) or a function from outputs [batch, ...] to
            [batch].
        n_random: random directions.
        pos: positions that are pushed; None for all observed ones.
        mask: bool [batch, time], True where observed.
        level: coverage of the intervals.
        n_boot: bootstrap resamples.
        seed: of random directions and resamples.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Curves with frame and figure.

    Raises:
        ArgumentError: no or infinite strengths, a level outside 0 to 1, no target, or a
            trunk that holds mirrored series too.
        UnknownHookError, HookError: of the direction's hook point.

    Source: Turner et al. 2023 (arXiv 2308.10248).

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> way = probing.Direction("hook_embed", torch.ones(128), "by hand", "ones")
        >>> result = probing.dose_response(model, torch.randn(8, 12, 25), way, [1.0], target=3,
        ...     n_random=2, progress=False)
        >>> result.strengths
        (0.0, 1.0)
    """
    series, mask = series_and_mask(data, mask)
    model.check_series(series, mask)
    require_one_pass(model, "to measure what a push does")
    measured = measure_of(model, measure, "probability")
    targets = targets_of(model, measured, target, len(series))
    doses = tuple(sorted({0.0, *(float(strength) for strength in strengths)}))
    if len(doses) < 2 or not np.isfinite(doses).all():
        raise ArgumentError(f"expected one or more strengths other than 0, got {list(strengths)}")
    check_intervals(level, n_boot)
    if n_random < 1:
        raise ArgumentError(f"expected n_random of at least 1, got {n_random}")
    others = random_directions(direction, n_random, seed)
    bar = tqdm(
        total=(1 + n_random) * (len(doses) - 1) + 1, desc="dose response", disable=not progress
    )

    def run(pushed: Direction, strength: float) -> np.ndarray:
        with model.steer(pushed, strength, pos):
            values = _measured(model, series, mask, measured, targets, batch_size)
        bar.update()
        return values

    with evaluating(model), bar:
        still = run(direction, 0.0)
        curves = [
            np.stack([run(one, dose) if dose else still for dose in doses], 1)
            for one in (direction, *others)
        ]
    values, random = curves[0], np.stack(curves[1:])
    zero = doses.index(0.0)
    change = values - values[:, [zero]]
    above = change - (random - random[:, :, [zero]]).mean(0)
    least, most = limits_of(measured.unit, values, random)
    none = values[:, zero].mean()
    ends = []
    for x, limits in ((change, (least - none, most - none)), (above, (least - most, most - least))):
        low, high = mean_interval(x, level=level, n_boot=n_boot, seed=seed, limits=limits)
        if np.isfinite(low).any():
            low[zero] = high[zero] = 0.0  # no push changes nothing, by construction
        ends.append((low, high))
    made = {
        "n_series": len(series),
        "n_random": n_random,
        "norm": direction.norm,
        "pos": "all" if pos is None else pos,
        "direction": direction.made,
        "seed": seed,
    }
    return DoseResponse(
        doses,
        values,
        random,
        *ends[0],
        *ends[1],
        hook=direction.hook,
        method=direction.method,
        unit=direction.unit,
        measure=measured.name,
        measure_unit=measured.unit,
        level=level,
        made=made,
    )


def _measured(
    model: HookedTST,
    series: Tensor,
    mask: Tensor | None,
    measure: Measure,
    targets: Tensor | None,
    batch_size: int,
) -> Float[np.ndarray, " series"]:
    parts = []
    device = model.cfg.device
    for start in range(0, len(series), batch_size):
        at = slice(start, start + batch_size)
        output = model(series[at].to(device), mask=None if mask is None else mask[at].to(device))
        parts.append(measure(output, None if targets is None else targets[at]).double().cpu())
    return torch.cat(parts).numpy()
