"""Do other series give the same ranking of sites, and what does patching do between alike ones?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import checked, shown
from tstlens.data import Pairs, TimeSeriesData
from tstlens.data.pairs import observed_alike
from tstlens.errors import ArgumentError, LabelError
from tstlens.model import HookedTST
from tstlens.patching.metrics import Metric, log_prob
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Site
from tstlens.patching.statistics import Groups, labels_of, pair_effects
from tstlens.patching.sweep import sweep
from tstlens.results import Result
from tstlens.stats import by_cluster, mean_known, rank_correlation, top_overlap

if TYPE_CHECKING:
    import pandas as pd


_BATCH = 256  # series per call of the model


@dataclass(frozen=True)
class SplitHalf(Result):
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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per split."""
        import pandas as pd

        columns = {"spearman": self.spearman, "top_k_overlap": self.top_k_overlap}
        return pd.DataFrame({"split": np.arange(len(self.spearman)), **columns})

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
    k: int = 5,
    *,
    n_splits: int = 200,
    cluster: Groups | None = None,
    seed: int = 0,
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
    if n_splits < 1 or k < 1:
        raise ArgumentError(f"expected n_splits and k of at least 1, got {n_splits} and {k}")
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
    n: int = 32,
    seed: int = 0,
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
