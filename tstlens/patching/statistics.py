"""Statistics over pairs: effects with intervals, tests, false discovery rates and stability.

Pairs that share a corrupted series are not independent, so whole *clusters* of pairs are drawn,
flipped and split. Everything here answers "had other series of this kind been picked?"; nothing
here covers another training seed of the model.

Do other series give the same ranking of sites, and what does patching do between alike ones?

How well an estimate of effects agrees with the exact ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import Count, Draws, Seed, Share, checked, shown
from tstlens.data import Pairs, TimeSeriesData
from tstlens.data.pairs import observed_alike
from tstlens.effects import Labelled, strongest
from tstlens.errors import ArgumentError, LabelError
from tstlens.metrics import Better, Metric
from tstlens.model import HookedTST
from tstlens.patching.metrics import log_prob
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Site
from tstlens.patching.sweep import sweep
from tstlens.stats import (
    adjusted,
    by_cluster,
    check_intervals,
    correlation,
    flip_p_values,
    limits_of,
    mean_interval,
    mean_known,
    rank_correlation,
    sign_agreement,
    top_overlap,
)

if TYPE_CHECKING:
    import pandas as pd


Groups = Sequence[Hashable] | Tensor | np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Summary(Labelled):
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

    ALONG: ClassVar = {
        **dict.fromkeys(("effect", "low", "high", "p", "q", "beyond_null")),
        **dict.fromkeys(("n_pairs", "n_clusters", "rounding"), ("class",)),
    }

    def columns(self) -> dict[str, Any]:
        """Effect, low, high, p, q, (beyond_null,) n_pairs and n_clusters."""
        names = ("effect", "low", "high", "p", "q", "beyond_null")
        parts = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        counts = {"n_pairs": self.n_pairs, "n_clusters": self.n_clusters}
        return parts | {name: self.spread(part, "class") for name, part in counts.items()}

    @checked
    def discoveries(self, q: Share = 0.05) -> pd.DataFrame:
        """Rows with a q-value of at most ``q``, largest effect first.

        Among them, about this share is expected to be false.
        """
        return strongest(self.to_dataframe().query("q <= @q"), "effect")

    def __repr__(self) -> str:
        return (
            f"Summary({self.site} [{self.shape_text()}], {self.metric}, {sum(self.n_pairs)} pairs, "
            f"{int((self.q <= 0.05).sum())} of {self.q.size} with q <= 0.05)"
        )


@checked
def summary(
    result: SweepResult,
    by: Groups | None = None,
    n_boot: Draws = 2000,
    *,
    cluster: Groups | None = None,
    level: Share = 0.95,
    n_flips: Draws = 10000,
    null: SweepResult | None = None,
    seed: Seed = 0,
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


_BATCH = 256  # series per call of the model


@dataclass(frozen=True, eq=False, repr=False)
class SplitHalf(Labelled):
    """Agreement of site rankings between random halves of the series.

    Args:
        spearman: [split], rank correlation of the mean effects of two halves.
        top_k_overlap: [split], share of one half's k largest effects (in size) among the other's;
            NaN where there are no more than k sites, since the top of all is all.
        k: how many sites count as the top.
        n_clusters: independent series that were split.
        site: what was replaced.
        metric: name of the metric.
        made: how.
    """

    spearman: Float[np.ndarray, " split"]
    top_k_overlap: Float[np.ndarray, " split"]
    k: int
    n_clusters: int
    site: str
    metric: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def reliability(self) -> float:
        """Rank reliability of all series together: 2r / (1 + r) of the mean half correlation r."""
        r = mean_known(self.spearman)
        return 2 * r / (1 + r) if r > -1 else float("-inf")

    @property
    def middle(self) -> tuple[float, float]:
        """The rank correlations between which 95 % of the splits lie; NaN where none is known."""
        known = self.spearman[np.isfinite(self.spearman)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        return float(low), float(high)

    def entries(self) -> dict[str, Any]:
        """One row per split."""
        return {"split": range(len(self.spearman))}

    def columns(self) -> dict[str, Any]:
        """Rank correlation and top-k overlap."""
        return {"spearman": self.spearman, "top_k_overlap": self.top_k_overlap}

    def __repr__(self) -> str:
        low, high = self.middle
        return (
            f"SplitHalf({self.site}, {self.n_clusters} series: Spearman "
            f"{mean_known(self.spearman):.2f} [{low:.2f}, {high:.2f}], top-{self.k} overlap "
            f"{mean_known(self.top_k_overlap):.2f})"
        )


@checked
def split_half(
    result: SweepResult,
    k: Count = 5,
    *,
    n_splits: Count = 200,
    cluster: Groups | None = None,
    seed: Seed = 0,
) -> SplitHalf:
    """How well two random halves of the series agree on which sites matter.

    Answers "would other series have given the same ranking?". What can mislead: halves are half as
    large as the whole, so they agree less than two full samples would (``reliability`` corrects
    for it, after Spearman and Brown); and many sites that all do nothing keep agreement low however
    clear the top is, so look at the top-k overlap too. Sites with an effect that is not finite
    take no part.

    Args:
        result: a sweep with its pair axis.
        k: how many of the largest mean effects count as the top.
        n_splits: random splits.
        cluster: a series per pair (``pairs.corrupted_index``), never split; None takes each pair.
        seed: of the splits.

    Raises:
        ArgumentError: fewer than 4 clusters, fewer than 3 sites, or k or n_splits below 1.

    Source: Spearman 1910; Brown 1910.

    Example:
        >>> import torch
        >>> from tstlens.patching import SweepResult
        >>> effects = torch.randn(20, 6) * 0.01 + torch.arange(6.0)
        >>> result = SweepResult(effects, ("pair", "head"), {"pair": tuple(range(20)),
        ...     "head": tuple(range(6))}, torch.zeros(20), torch.ones(20), "logit", "logit", "z")
        >>> float(split_half(result, k=2).spearman.min())
        1.0
    """
    effects = pair_effects(result)
    names = range(len(effects)) if cluster is None else labels_of(cluster, len(effects), "cluster")
    sums, counts = by_cluster(effects, list(names))
    sums = sums[:, np.isfinite(sums).all(0)]
    if len(counts) < 4 or sums.shape[1] < 3:
        raise ArgumentError(
            f"expected at least 4 independent series and 3 sites of finite effects to rank, got "
            f"{len(counts)} and {sums.shape[1]}"
        )
    generator = np.random.default_rng(seed)
    spearman, overlap = np.empty(n_splits), np.empty(n_splits)
    for split in range(n_splits):
        order = generator.permutation(len(counts))
        halves = (order[: len(order) // 2], order[len(order) // 2 :])
        one, other = (sums[half].sum(0) / counts[half].sum() for half in halves)
        spearman[split] = rank_correlation(one, other)
        overlap[split] = top_overlap(one, other, k)
    made = {**result.made, "n_splits": n_splits, "seed": seed}
    return SplitHalf(
        spearman, overlap, min(k, sums.shape[1]), len(counts), result.site, result.metric, made
    )


@checked
def alike_pairs(
    model: Callable[..., Tensor],
    data: TimeSeriesData,
    n: Count = 32,
    seed: Seed = 0,
    *,
    equal_lengths: bool = False,
) -> Pairs:
    """Pairs of series that the model treats alike: same class, both right, nearest outputs.

    Each of ``n`` series, drawn at random from those that are classified right, is the corrupted
    one; its clean partner is the series of its class with the nearest log-probabilities.

    Args:
        model: series [batch, channel, time] to logits [batch, class]; logit i is class i of the
            data.
        data: labelled series.
        n: how many pairs (fewer where fewer series have a partner).
        seed: of the draw.
        equal_lengths: only pairs of series observed at the same samples.

    Raises:
        LabelError: no labels, or as many logits as there are not classes.
        ArgumentError: no class has two series that are classified right.
    """
    data = data.for_model(model)
    if data.labels is None:
        raise LabelError("expected labelled data, got data without labels")
    if not len(data):
        raise ArgumentError("expected series to pair, got none")
    labels = data.labels.to(data.series.device)
    outputs = []
    with torch.no_grad():
        for start in range(0, len(data), _BATCH):
            rows = slice(start, start + _BATCH)
            seen = {} if data.mask is None else {"mask": data.mask[rows]}
            output = model(data.series[rows], **seen)
            wanted = (len(labels[rows]), data.n_classes)
            if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
                raise LabelError(
                    f"expected logits [batch={wanted[0]}, class={wanted[1]}] from the model, one "
                    f"per class of the data, got {shown(output)}"
                )
            outputs.append(output)
    log_probs = torch.cat(outputs).double().log_softmax(-1)
    right = log_probs.argmax(1) == labels
    distance = torch.cdist(log_probs, log_probs)
    eligible = right[:, None] & right & (labels[:, None] == labels)
    if equal_lengths:
        alike = observed_alike(data)
        eligible &= alike[:, None] == alike
    distance = distance.masked_fill(~eligible, torch.inf).fill_diagonal_(torch.inf)
    having = distance.isfinite().any(1).nonzero()[:, 0].cpu()
    if not len(having):
        raise ArgumentError(
            "expected a class with two series that the model classifies right, found none"
        )
    generator = torch.Generator().manual_seed(seed)
    corrupted = having[torch.randperm(len(having), generator=generator)[:n]].sort().values
    clean = distance[corrupted].argmin(1)
    return Pairs(
        clean=data.series[clean],
        corrupted=data.series[corrupted],
        target=labels[corrupted],
        clean_mask=None if data.mask is None else data.mask[clean],
        corrupted_mask=None if data.mask is None else data.mask[corrupted],
        clean_index=clean,
        corrupted_index=corrupted,
        made={"data": data.name, "split": data.split, "how": "alike_pairs", "seed": seed},
    )


@checked
def null_map(
    model: HookedTST,
    pairs: Pairs,
    site: str | Site,
    axes: Sequence[str],
    metric: Callable[[Tensor], Metric] = log_prob,
    **options: Any,
) -> SweepResult:
    """A sweep between series that the model treats alike: what patching does when nothing differs.

    Effects of a sweep are to be compared with it (``summary(result, null=...)``): a site that moves
    the metric as much between two alike series as between a clean and a corrupted one says little.
    What can mislead: alike in output is not alike inside, and where both runs are certain of the
    class the probability and log-probability hardly move, so prefer logits here.

    Args:
        model: the model.
        pairs: from :func:`alike_pairs`, or any pairs that are taken to be alike.
        site: as for :func:`sweep`.
        axes: as for :func:`sweep`.
        metric: makes the metric from the pairs' targets.
        **options: of :func:`sweep`.

    Returns:
        The sweep's result, ``made["method"]`` being ``"null"``.
    """
    made = None if isinstance(metric, Metric) else metric(pairs.target)
    if not isinstance(made, Metric):
        raise ArgumentError(
            "expected metric as a function from targets to a metric, patching.logit say, got "
            f"{shown(metric)}"
        )
    result = sweep(
        model,
        pairs.clean,
        pairs.corrupted,
        site,
        axes,
        made,
        clean_mask=pairs.clean_mask,
        corrupted_mask=pairs.corrupted_mask,
        **options,
    )
    return replace(result, made={**result.made, "method": "null"})


_MEASURES = ("pearson", "spearman", "top_k_overlap", "sign_agreement")


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Labelled):
    """Agreement of two maps of effects, pair by pair.

    Args:
        pearson: [pair], correlation of the effects; NaN where one map is constant.
        spearman: [pair], correlation of their ranks (signed effects, not their sizes).
        top_k_overlap: [pair], share of the exact map's k largest effects (in size) that are among
            the estimate's k largest; NaN where there are no more than k sites.
        sign_agreement: [pair], share of sites with the same sign, among sites whose exact effect
            is at least 1 % of the pair's largest.
        k: how many sites count as the top.
        exact: [pair, site], the exact effects.
        approximate: [pair, site], the estimated ones.
        sites: what each site is, by axis.
        metric: name of the metric.
        unit: its unit.
        site: what was replaced.
        made: how both were made.
    """

    pearson: Float[np.ndarray, " pair"]
    spearman: Float[np.ndarray, " pair"]
    top_k_overlap: Float[np.ndarray, " pair"]
    sign_agreement: Float[np.ndarray, " pair"]
    k: int
    exact: Float[Tensor, "pair site"]
    approximate: Float[Tensor, "pair site"]
    sites: tuple[dict[str, Any], ...]
    metric: str
    unit: str
    site: str
    made: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """One row per pair."""
        return {"pair": range(len(self.pearson))}

    def columns(self) -> dict[str, Any]:
        """The four measures."""
        return {name: getattr(self, name) for name in _MEASURES}

    def effects(self) -> pd.DataFrame:
        """One row per pair and site: its axes, the exact and the approximate effect."""
        import pandas as pd

        n_pairs = len(self.exact)
        frame = pd.DataFrame(list(self.sites) * n_pairs)
        frame.insert(0, "pair", np.repeat(np.arange(n_pairs), len(self.sites)))
        frame["exact"] = self.exact.flatten().numpy()
        frame["approximate"] = self.approximate.flatten().numpy()
        return frame

    def __repr__(self) -> str:
        means = [f"{name} {mean_known(part):.3f}" for name, part in self.columns().items()]
        return (
            f"Agreement({self.site}, {len(self.pearson)} pairs x {len(self.sites)} sites, "
            f"means: {', '.join(means)})"
        )


@checked
def agreement(exact: SweepResult, approximate: SweepResult, k: Count = 5) -> Agreement:
    """How well one sweep's effects agree with another's, pair by pair.

    Answers "may I trust the cheap map?". What can mislead: a high correlation can rest on a few
    strong sites while all others are wrong, and a low one on noise among sites that do nothing,
    so look at the figure (a scatter) and at the top-k overlap too. A site whose effect is not
    finite in one of the two takes no part in that pair.

    Args:
        exact: a :func:`sweep` (or whatever is taken as the truth).
        approximate: an :func:`attribution` of the same pairs, site, axes and metric.
        k: how many of the largest effects count as the top; without more sites than that, there
            is no top-k overlap (NaN).

    Returns:
        Pearson, Spearman, top-k overlap and sign agreement per pair, with frame and figure.

    Raises:
        ArgumentError: the results are of other axes, sites or metrics, or k is below 1.

    Example:
        >>> import torch
        >>> from tstlens.patching import SweepResult
        >>> def result(values):
        ...     return SweepResult(torch.tensor([values]), ("pair", "layer"),
        ...         {"pair": (0,), "layer": (0, 1, 2)}, torch.zeros(1), torch.ones(1),
        ...         "logit", "logit", "attn_out")
        >>> both = agreement(result([0.1, 0.2, 0.6]), result([0.2, 0.1, 0.9]), k=1)
        >>> round(float(both.spearman[0]), 2), float(both.top_k_overlap[0])
        (0.5, 1.0)
    """
    for name in ("axes", "coords", "metric", "site"):
        first, second = getattr(exact, name), getattr(approximate, name)
        if first != second:
            raise ArgumentError(
                f"expected two results over the same {name}, got {first} and {second}; run both "
                "with the same site, axes, pairs and metric"
            )
    axes = tuple(axis for axis in exact.axes if axis != "pair")
    grid = torch.cartesian_prod(*(torch.arange(len(exact.coords[axis])) for axis in axes))
    index = grid.view(-1, len(axes)).tolist() if axes else [[]]
    sites = tuple(
        {axis: exact.coords[axis][at] for axis, at in zip(axes, entry, strict=True)}
        for entry in index
    )
    truth, guess = (
        result.effect().detach().double().cpu().reshape(-1, len(sites))
        for result in (exact, approximate)
    )
    rows = [
        (
            correlation(a, b),
            rank_correlation(a, b),
            top_overlap(a, b, min(k, len(sites))),
            sign_agreement(a, b),
        )
        for a, b in zip(truth.numpy(), guess.numpy(), strict=True)
    ]
    pearson, spearman, top, sign = np.array(rows, dtype=float).T
    return Agreement(
        pearson,
        spearman,
        top,
        sign,
        min(k, len(sites)),
        truth,
        guess,
        sites,
        exact.metric,
        exact.unit,
        exact.site,
        made={"exact": exact.made, "approximate": approximate.made},
    )
