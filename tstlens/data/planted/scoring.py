"""Scores against a planted answer: which samples, which states, which features.

Every score comes with what a method would get that knows nothing, on the same series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownNameError
from tstlens.randomness import seeded
from tstlens.results import Result
from tstlens.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["WhereScore", "score_where"]

SIGNS = ("given", "absolute", "positive")


@dataclass(frozen=True)
class WhereScore(Result):
    """How well an attribution finds the samples that decide, beside random order.

    Args:
        auprc: [series] area under the precision-recall curve (average precision), 0 to 1; NaN
            for series in which no sample decides, or every one.
        random: [series] the same for entries in random order: the exact mean over all orders.
        density: [series] share of the entries that decide: what ``random`` tends to in long
            series.
        precision: [series] share of deciding entries among the ``top`` ones.
        recall: [series] share of the deciding entries that are among the ``top`` ones.
        mean: of ``auprc`` over the scored series.
        low: lower end of its interval over series; NaN for fewer than 5.
        high: upper end.
        level: coverage of the interval.
        n_scored: series that count.
        unit: what an entry is: "channel x time" or "time".
        made: how.
    """

    auprc: Float[np.ndarray, " series"]
    random: Float[np.ndarray, " series"]
    density: Float[np.ndarray, " series"]
    precision: Float[np.ndarray, " series"]
    recall: Float[np.ndarray, " series"]
    mean: float
    low: float
    high: float
    level: float
    n_scored: int
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per series: auprc, random, density, precision, recall."""
        import pandas as pd

        names = ("auprc", "random", "density", "precision", "recall")
        frame = pd.DataFrame({name: getattr(self, name) for name in names})
        return frame.rename_axis("series").reset_index()

    def __repr__(self) -> str:
        return (
            f"WhereScore(AUPRC {self.mean:.3f} [{self.low:.3f}, {self.high:.3f}], random "
            f"{np.nanmean(self.random):.3f}, {self.n_scored} of {len(self.auprc)} series)"
        )


@checked
def score_where(
    attribution: Float[Tensor, "n *channel place"],
    mask: Bool[Tensor, "n channel time"],
    *,
    cells: Sequence[tuple[int, int]] | None = None,
    sign: str = "absolute",
    top: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> WhereScore:
    """Whether an attribution ranks the samples that decide above the others.

    The area under the precision-recall curve asks about the whole ranking, and needs no threshold.
    What can mislead: a map over positions gives all samples of a patch the same score and so
    cannot reach 1; one without channels is scored on *when* alone, which is an easier question
    (``unit`` tells); the samples that decide are those that *any* classifier needs, not those
    that yours uses.

    Args:
        attribution: one score per place, larger where it matters more: ``[series, channel, time]``
            or ``[series, time]``; with ``cells``, ``[series, channel, pos]`` or ``[series, pos]``.
        mask: ``[series, channel, time]`` bool, True where a sample decides.
        cells: the samples ``(start, stop)`` of each position, as results keep them in
            ``time_cells``; they must tile time.
        sign: ``"absolute"`` ranks by size, ``"positive"`` counts negative scores as zero,
            ``"given"`` ranks as given.
        top: share of the entries, 0 to 1, that ``precision`` and ``recall`` look at; None for as
            many as decide, where the two are equal.
        level: coverage of the interval.
        seed: of the interval's resamples.

    Returns:
        A WhereScore; its interval is over series, not over models
        (:func:`tstlens.stats.mean_interval`).

    Raises:
        SeriesShapeError: shapes that do not belong together.
        ArgumentError: NaN in the attribution, no series to score, or a share that is none.
        UnknownNameError: a sign that does not exist.

    Source: the explanation scores of Queen et al. 2023, arXiv 2306.02109;
    :func:`sklearn.metrics.average_precision_score`.

    Example:
        >>> from tstlens.data import planted
        >>> task = planted("low-var", n_train=6)
        >>> score_where(task.mask.float(), task.mask).mean
        1.0
    """
    if sign not in SIGNS:
        raise UnknownNameError(sign, SIGNS, "this names what score_where does with signs")
    for name, share in (("top", top), ("level", level)):
        if share is not None and not 0 < share < 1:
            raise ArgumentError(f"{name}: expected a share between 0 and 1, got {share}")
    scores, truth, unit = _laid_out(attribution, mask, cells)
    if not bool(scores.isfinite().all()):
        raise ArgumentError("attribution: expected finite scores, got NaN or infinity")
    if sign != "given":
        scores = scores.abs() if sign == "absolute" else scores.clamp(min=0)
    values = _per_series(scores.numpy(), truth.numpy(), top)
    scored = ~np.isnan(values["auprc"])
    if not scored.any():
        raise ArgumentError(
            "mask: expected series in which some samples decide and some do not, got none"
        )
    ends = mean_interval(values["auprc"][scored][:, None], level=level, seed=seed, limits=(0, 1))
    low, high = (float(end[0]) for end in ends)
    made = {"sign": sign, "top": top, "seed": seed, "over_positions": cells is not None}
    return WhereScore(
        **values,
        mean=float(values["auprc"][scored].mean()),
        low=low,
        high=high,
        level=level,
        n_scored=int(scored.sum()),
        unit=unit,
        made=made,
    )


def _laid_out(
    attribution: Tensor, mask: Tensor, cells: Sequence[tuple[int, int]] | None
) -> tuple[Tensor, Tensor, str]:
    """Scores and truth as [series, entry] on the CPU, and what an entry is."""
    if mask.ndim != 3 or mask.dtype != torch.bool:
        raise SeriesShapeError(
            f"expected a bool mask [series, channel, time], got {mask.dtype} {list(mask.shape)}"
        )
    scores, truth = attribution.detach().cpu().double(), mask.cpu()
    n, n_channels, n_time = truth.shape
    width = n_time if cells is None else len(cells)
    last = "time" if cells is None else "pos"
    if scores.shape not in ((n, n_channels, width), (n, width)):
        advice = "" if cells is not None else "; a map over positions needs cells="
        raise SeriesShapeError(
            f"expected an attribution [series={n}, channel={n_channels}, {last}={width}] or "
            f"[series={n}, {last}={width}], got {list(scores.shape)}{advice}"
        )
    if cells is not None:
        starts, stops = zip(*cells, strict=True)
        if (0, *stops) != (*starts, n_time):
            raise ArgumentError(
                f"cells: expected samples that tile 0..{n_time} one after the other, "
                f"got {list(cells)[:3]}..{cells[-1]}"
            )
        lengths = torch.tensor(stops) - torch.tensor(starts)
        scores = scores.repeat_interleave(lengths, dim=-1)
    if scores.ndim == 3:
        return scores.flatten(1), truth.flatten(1), "channel x time"
    return scores, truth.any(1), "time"


@seeded(0)
def _per_series(scores: np.ndarray, truth: np.ndarray, top: float | None) -> dict[str, np.ndarray]:
    from sklearn.metrics import average_precision_score

    names = ("auprc", "random", "density", "precision", "recall")
    values = {name: np.full(len(scores), np.nan) for name in names}
    values["density"] = truth.mean(1)
    for row, (score, decides) in enumerate(zip(scores, truth, strict=True)):
        n_true = int(decides.sum())
        if n_true in (0, len(decides)):
            continue
        values["auprc"][row] = average_precision_score(decides, score)
        values["random"][row] = _random_order(n_true, len(decides))
        k = n_true if top is None else max(1, round(top * len(decides)))
        found = _found(score, decides, k)
        values["precision"][row], values["recall"][row] = found / k, found / n_true
    return values


def _random_order(n_true: int, n: int) -> float:
    """The mean average precision over all orders of n entries of which n_true decide.

    Source: Bestgen 2015, "Exact expected average precision of the random baseline".
    """
    harmonic = (1 / np.arange(1, n + 1)).sum()
    return float((harmonic + (n_true - 1) / (n - 1) * (n - harmonic)) / n)


def _found(score: np.ndarray, decides: np.ndarray, k: int) -> float:
    """Deciding entries among the k with the highest scores; ties at the edge count in parts."""
    edge = np.partition(score, len(score) - k)[len(score) - k]
    above, at = score > edge, score == edge
    room = (k - above.sum()) / at.sum()
    return float(decides[above].sum() + room * decides[at].sum())
