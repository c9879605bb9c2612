"""How well each latent tells the classes apart, and how well it would by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from tstlens.errors import ArgumentError, LabelError
from tstlens.saes.reading.activity import Activity
from tstlens.stats import adjusted

FEWEST_PERMUTATIONS = 100


@dataclass(frozen=True, eq=False)
class ClassAssociation:
    """Area under the ROC curve of each latent for each class, with permutation control.

    Args:
        auc: [latent, class], one against the rest; 0.5 is chance, below it the latent is active
            elsewhere; NaN for classes without series, or with all of them.
        best: [latent] the class whose AUC is furthest from chance in its standard errors.
        p: [latent] permutation p-value of the best class (the choice of class is repeated in
            every permutation).
        q: [latent] p after Benjamini and Hochberg over the latents that are active; NaN elsewhere.
        chance: [latent] |AUC - 0.5| of the best class when labels are shuffled, on average.
        active_share: [latent, class] share of a class' series in which the latent is active.
        n_permutations: shuffles of the labels over series.
    """

    auc: Float[np.ndarray, "latent class"]
    best: Int[np.ndarray, " latent"]
    p: Float[np.ndarray, " latent"]
    q: Float[np.ndarray, " latent"]
    chance: Float[np.ndarray, " latent"]
    active_share: Float[np.ndarray, "latent class"]
    n_permutations: int

    def best_auc(self) -> Float[np.ndarray, " latent"]:
        """AUC of the best class."""
        return self.auc[np.arange(len(self.best)), self.best]


def class_association(
    activity: Activity,
    labels: Int[np.ndarray, " series"],
    n_classes: int,
    *,
    n_permutations: int = 1000,
    seed: int = 0,
) -> ClassAssociation:
    """Whether a latent is stronger in the series of one class than in all others.

    The score of a series is the latent's largest activation in it, since positions of one series
    are not independent and the class belongs to the series. What can mislead: a latent that fires
    in every series of a class but equally elsewhere at other times has a low AUC; a class the
    model confuses still counts under its true label; with few series per class chance is far from
    0.5, so look at ``q`` and ``chance``.

    Args:
        activity: of the latents.
        labels: [series] classes 0..n_classes-1.
        n_classes: classes.
        n_permutations: shuffles of the labels; the smallest p is 1 / (n_permutations + 1).
        seed: of the shuffles.

    Raises:
        LabelError: another number of labels than series.
        ArgumentError: fewer than 100 permutations.

    Source: Mann and Whitney 1947 (AUC from ranks); Phipson and Smyth 2010 (permutation p-values).
    """
    if len(labels) != activity.n_series:
        raise LabelError(f"expected {activity.n_series} labels, got {len(labels)}")
    if n_permutations < FEWEST_PERMUTATIONS:
        raise ArgumentError(
            f"expected n_permutations of at least {FEWEST_PERMUTATIONS}, got {n_permutations}"
        )
    scores = activity.strongest()
    ranks = rankdata(scores, axis=0) - (len(labels) + 1) / 2  # [series, latent], mean 0
    member = np.eye(n_classes)[labels]  # [series, class]
    size = member.sum(0)
    pairs = size * (len(labels) - size)
    usable = pairs > 0
    error = np.sqrt((len(labels) + 1) / 12 / np.where(usable, pairs, np.nan))  # of an AUC
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = 0.5 + (member.T @ ranks).T / np.where(usable, pairs, np.nan)
    active = activity.density > 0
    standard = np.nan_to_num(np.abs(auc - 0.5) / error)
    # Of two classes both are as far from chance: name the one that the latent is stronger in.
    best = (standard + 1e-6 * (np.nan_to_num(auc) > 0.5)).argmax(1)
    observed = standard.max(1)
    at_least = np.zeros(activity.n_latents)
    chance = np.zeros(activity.n_latents)
    generator = np.random.default_rng(seed)
    weights = np.where(usable, 1 / np.where(usable, pairs, 1), 0)
    inverse = np.nan_to_num(1 / error)
    ranks = ranks.astype(np.float32)
    for _ in range(n_permutations):
        shuffled = generator.permutation(member).astype(np.float32)
        found = np.abs(shuffled.T @ ranks).T * weights  # [latent, class], |AUC - 0.5|
        found_standard = found * inverse
        at_least += found_standard.max(1) >= observed - 1e-6
        chosen = found_standard.argmax(1)
        chance += found[np.arange(len(found)), chosen]
    p = (1 + at_least) / (1 + n_permutations)
    q = adjusted(np.where(active, p, np.nan))
    fired = activity_in_series(activity)
    share = (member.T @ fired).T / np.maximum(size, 1)
    return ClassAssociation(auc, best, p, q, chance / n_permutations, share, n_permutations)


def activity_in_series(activity: Activity) -> Float[np.ndarray, "series latent"]:
    """1 where a latent is active anywhere in a series, else 0."""
    fired = np.zeros((activity.n_series, activity.n_latents))
    column = np.repeat(np.arange(activity.n_latents), np.diff(activity.values.indptr))
    fired[activity.values.indices // (activity.n_channels * activity.n_pos), column] = 1
    return fired
