"""Where two sets of series can be told apart: a layer x position map of held-out AUC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Count, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.model.activations import activations
from tstlens.probing.steering import as_data
from tstlens.randomness import seeded

RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # on standardised activations


@dataclass(frozen=True, repr=False)
class Separability(Labelled):
    """Held-out AUC of a linear discriminant at every hook point and position.

    Args:
        auc: [hook, pos], chance that a held-out series of ``b`` scores above one of ``a``: 0.5 is
            chance, 1 perfect; NaN where too few series observed the position.
        null: [permutation, hook, pos], the same with the sets' names shuffled over the series.
        n_series: [hook, pos], series that observed the position.
        hooks: full hook names.
        time_cells: samples of every position, or None.
        made: how.
    """

    auc: Float[np.ndarray, "hook pos"]
    null: Float[np.ndarray, "permutation hook pos"]
    n_series: Int[np.ndarray, "hook pos"]
    hooks: tuple[str, ...]
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def null_95(self) -> Float[np.ndarray, "hook pos"]:
        """95th percentile of the null, place by place."""
        return np.quantile(self.null, 0.95, axis=0)

    @property
    def p(self) -> Float[np.ndarray, "hook pos"]:
        """p-value corrected for the whole map: how often the null's *largest* AUC is as large.

        No value lies below 1 / (permutations + 1).
        """
        known = np.isfinite(self.auc)
        largest = self.null[:, known].max(1, initial=0.0)
        count = (largest[:, None, None] >= self.auc[None]).sum(0)
        return np.where(known, (1 + count) / (1 + len(largest)), np.nan)

    def entries(self) -> dict[str, Sequence[Any]]:
        """Hook points and positions."""
        return {"hook": self.hooks, "pos": range(self.auc.shape[1])}

    def columns(self) -> dict[str, np.ndarray]:
        """AUC, mean and 95th percentile of the null, p, series."""
        return {
            "auc": self.auc,
            "null_mean": self.null.mean(0),
            "null_95": self.null_95,
            "p": self.p,
            "n_series": self.n_series,
        }

    def __repr__(self) -> str:
        if not np.isfinite(self.auc).any():
            return "Separability(no position that enough series observed)"
        row, pos = np.unravel_index(np.nanargmax(self.auc), self.auc.shape)
        return (
            f"Separability({len(self.hooks)} hooks x {self.auc.shape[1]} positions, best AUC "
            f"{self.auc[row, pos]:.3f} at {self.hooks[row]}, position {pos}; null "
            f"{np.nanmean(self.null):.3f})"
        )


@checked
def separability(
    model: HookedTST,
    a: Tensor | TimeSeriesData,
    b: Tensor | TimeSeriesData,
    hooks: str | Sequence[str] = "resid_post",
    *,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    n_splits: int = 5,
    n_permutations: Count = 200,
    seed: Seed = 0,
    progress: bool = True,
) -> Separability:
    """How well a linear discriminant tells two sets of series apart, by layer and position.

    Answers "where does the model hold what differs between these series?". At every position a
    discriminant is fitted on some of the series and scores the others, in stratified folds that are
    the same everywhere; names of the sets shuffled within the folds give the null. For two sets
    Fisher's discriminant is the least-squares fit of +1 and -1, which is how it is computed, with
    a ridge chosen by leave-one-out among the fitted series. Where channels go through the trunk by
    themselves, they stand side by side.

    What can mislead: what can be read off an activation need not be used by the model (steer with
    it and see). Neighbouring positions and layers share their series, so the map is smooth.

    Args:
        model: the model.
        a: series [batch, channel, time], or data with their mask.
        b: the series that they are to be told from.
        hooks: short names that stand for all layers (``"resid_post"``), or full ones; all with the
            same positions.
        a_mask: bool [batch, time], True where ``a`` was observed.
        b_mask: the same of ``b``.
        n_splits: folds; a position needs this many observed series of each set.
        n_permutations: shuffles of the null.
        seed: of folds and shuffles.
        progress: show a progress bar.

    Returns:
        The map, with frame and figure.

    Raises:
        UnknownHookError, HookError: no such hook point, or one that cannot fire.
        ArgumentError: fewer series of a set than folds, or hooks of different positions.

    Source: Fisher 1936; Wilinski et al. 2024 (arXiv 2409.12915) for the map over layers and
        patches; scikit-learn's ``RidgeCV`` and ``StratifiedKFold``.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> found = probing.separability(model, torch.randn(9, 12, 25), torch.randn(9, 12, 25) + 1,
        ...     hooks="blocks.0.hook_resid_post", n_splits=3, n_permutations=1, progress=False)
        >>> found.auc.shape
        (1, 25)
    """
    sets = [as_data(a, a_mask), as_data(b, b_mask)]
    fewest = min(len(data) for data in sets)
    if n_splits < 2 or fewest < n_splits:
        raise ArgumentError(
            f"expected n_splits between 2 and the {fewest} series of the smaller set, got "
            f"{n_splits}"
        )
    held = [activations(model, data, hooks) for data in sets]
    names = tuple(held[0])
    shapes = {name: held[0][name].values.shape[2] for name in names}
    if len(set(shapes.values())) > 1 or any(
        held[1][name].values.shape[2] != shapes[name] for name in names
    ):
        raise ArgumentError(f"expected hooks and sets with the same positions, got {shapes}")
    labels = np.repeat([0, 1], [len(data) for data in sets])
    fold = _folds(labels, n_splits, seed)
    generator = np.random.default_rng(seed)
    # The same shuffles at every place, so that the largest AUC of a map has a null of its own.
    # Names are shuffled within folds, which keeps every fold's share of both sets.
    named = np.stack([labels, *(_shuffled(labels, fold, generator) for _ in range(n_permutations))])
    n_pos = shapes[names[0]]
    found = np.full((len(named), len(names), n_pos), np.nan)
    counts = np.zeros((len(names), n_pos), dtype=int)
    total = len(names) * n_pos
    with tqdm(total=total, desc="separability", unit="place", disable=not progress) as bar:
        for row, name in enumerate(names):
            both = [part[name].joined() for part in held]
            x = np.concatenate([part.values[:, 0] for part in both]).astype(float)
            seen = np.concatenate([part.observed[:, 0] for part in both])
            for pos in range(n_pos):
                keep = seen[:, pos]
                counts[row, pos] = keep.sum()
                found[:, row, pos] = _aucs(x[keep, pos], named[:, keep], fold[keep])
                bar.update()
    made = {
        "n_a": len(sets[0]),
        "n_b": len(sets[1]),
        "n_splits": n_splits,
        "n_permutations": n_permutations,
        "seed": seed,
    }
    cells = held[0][names[0]].time_cells
    return Separability(found[0], found[1:], counts, names, cells, made)


@seeded(0)
def _folds(labels: np.ndarray, n_splits: int, seed: int) -> Int[np.ndarray, " series"]:
    from sklearn.model_selection import StratifiedKFold

    fold = np.zeros(len(labels), dtype=int)
    splits = StratifiedKFold(n_splits, shuffle=True, random_state=seed)
    for number, (_, test) in enumerate(splits.split(labels[:, None], labels)):
        fold[test] = number
    return fold


def _shuffled(labels: np.ndarray, fold: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Labels shuffled among the series of each fold."""
    drawn = labels.copy()
    for number in np.unique(fold):
        drawn[fold == number] = generator.permutation(labels[fold == number])
    return drawn


@seeded(0)
def _aucs(
    x: Float[np.ndarray, "seen width"],
    named: Int[np.ndarray, "naming seen"],
    fold: Int[np.ndarray, " seen"],
) -> Float[np.ndarray, " naming"]:
    """Mean held-out AUC of every naming of the sets; NaN where a fold lacks one of them."""
    from scipy.stats import rankdata
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = []
    for number in np.unique(fold):
        test = fold == number
        n_b = named[:, test].sum(1).astype(float)
        n_a = test.sum() - n_b
        fitted = named[:, ~test].sum(1)
        if not (n_a.all() and n_b.all() and fitted.all() and ((~test).sum() - fitted).all()):
            return np.full(len(named), np.nan)
        # All namings share one decomposition of x; each has a ridge of its own.
        ridge = RidgeCV(alphas=RIDGES, alpha_per_target=True)
        model = make_pipeline(StandardScaler(), ridge).fit(x[~test], 2.0 * named[:, ~test].T - 1)
        ranks = rankdata(model.predict(x[test]).reshape(test.sum(), -1), axis=0).T
        rank_sum = (ranks * named[:, test]).sum(1)
        scores.append((rank_sum - n_b * (n_b + 1) / 2) / (n_a * n_b))
    return np.mean(scores, 0)
