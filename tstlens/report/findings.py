"""The strongest sites of a sweep as numbers and as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tstlens.figures import Interval, over_pairs
from tstlens.figures.words import site_label
from tstlens.patching import SweepResult
from tstlens.report.views import as_probability
from tstlens.report.wording import chance, nats, percent


@dataclass(frozen=True)
class Finding:
    """What restoring one site does, over the pairs of a set.

    Args:
        label: "L0H6", "sample 12", "MLP L1".
        place: axis -> entry.
        mean: mean change of log p of the target class, in nats.
        low: lower end of its 95 % interval; None where there are too few series for one, or too
            few with an effect.
        high: upper end.
        share: mean change over the mean clean-corrupted gap.
        n_pairs: pairs averaged over.
        n_raised: pairs in which log p went up.
        p_corrupted: mean probability of the target class in the corrupted run.
        p_patched: the same with this site restored.
        strongest: fraction of bootstrap resamples in which no site is stronger; None with
            too few series.
        control: mean change at this site in the control, in nats; None where there is none.
        n_first: pairs in which no site changes log p more.
    """

    label: str
    place: dict[str, Any]
    mean: float
    low: float | None
    high: float | None
    share: float | None
    n_pairs: int
    n_raised: int
    p_corrupted: float
    p_patched: float
    strongest: float | None
    control: float | None
    n_first: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def interval(self) -> str:
        """The interval with its pairs, in words."""
        pairs = f"{self.n_pairs} pair{'s' if self.n_pairs != 1 else ''}"
        if self.low is None or self.high is None:
            of = "for" if self.strongest is None else "that are not 0 for"
            return f"{pairs}, too few {of} an interval; up in {self.n_raised} of {self.n_pairs}"
        ends = f"{nats(self.low, True)} to {nats(self.high, True)}"
        return f"95 % CI {ends}; {pairs}"

    def sentence(self, what: str) -> str:
        """What restoring ``what`` does, one sentence with units."""
        gap = f"{_gap(self.share)}; " if self.share is not None else ""
        return (
            f"Restoring {what} moves log p of the target class by {nats(self.mean, True)} nats "
            f"({self.interval}): it {gap}the mean probability goes from "
            f"{chance(self.p_corrupted)} to {chance(self.p_patched)}."
        )


def _gap(share: float) -> str:
    if share < 0:
        return f"widens the gap to the clean run by {percent(-share)}"
    return f"closes {percent(share)} of the gap to the clean run"


def intervals(result: SweepResult, clusters: Sequence[int], seed: int) -> tuple[Interval, Interval]:
    """Effect in nats and share of the gap, both over pairs."""
    return (
        over_pairs(result, clusters=clusters, seed=seed),
        over_pairs(result, "normalized", clusters=clusters, seed=seed),
    )


def strongest(
    result: SweepResult,
    clusters: Sequence[int],
    seed: int,
    control: SweepResult | None = None,
    n: int = 5,
) -> list[Finding]:
    """The n sites with the largest mean change in size, strongest first.

    Args:
        result: a sweep of log-probabilities with its pair axis.
        clusters: one per pair.
        seed: of the bootstrap.
        control: the same grid over control pairs.
        n: how many.
    """
    effect, share = intervals(result, clusters, seed)
    probability = as_probability(result)
    axes = [axis for axis in result.axes if axis != "pair"]
    order = np.argsort(-np.abs(effect.mean), axis=None, kind="stable")[:n]
    first = result.effect().flatten(1).abs().argmax(1)
    found = []
    for flat in order:
        at = np.unravel_index(int(flat), effect.mean.shape)
        place = {axis: result.coords[axis][int(i)] for axis, i in zip(axes, at, strict=True)}
        everywhere = (slice(None), *(int(i) for i in at))
        label = str(place["part"]) if "part" in place else site_label(place, result.time_cells)
        found.append(
            Finding(
                label=label,
                place=place,
                mean=float(effect.mean[at]),
                low=_known(effect.low[at]),
                high=_known(effect.high[at]),
                share=_known(share.mean[at]),
                n_pairs=effect.n_pairs,
                n_raised=int((result.effect()[everywhere] > 0).sum()),
                p_corrupted=float(probability.baseline.mean()),
                p_patched=float(probability.values[everywhere].mean()),
                strongest=_known(effect.strongest[at]),
                control=None if control is None else float(control.effect()[everywhere].mean()),
                n_first=int((first == int(flat)).sum()),
            )
        )
    return found


def noise(control: SweepResult | None) -> float | None:
    """The mean change, largest in size, of any site in the control, in nats."""
    if control is None:
        return None
    means = control.mean("pair").effect().flatten()
    return float(means[means.abs().argmax()])


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
