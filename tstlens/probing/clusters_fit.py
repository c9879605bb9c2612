"""Clusters of activations and of latents, beside what shuffled labels and the raw input give."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float, Int

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.probing.clusters_result import Agreement, Clusters, What
from tstlens.probing.extraction import Activations, Pool, activations, check_pool, latents
from tstlens.randomness import seeded

Method = Literal["kmeans", "hdbscan"]
SCORES = ("ari", "nmi", "ami")
MOST_SILHOUETTE = 5000  # samples; distances between all pairs are held at once


@checked
def clusters(
    model: HookedTST,
    data: TimeSeriesData,
    hook: str | None = None,
    *,
    sae: Any = None,
    what: What = "series",
    n_clusters: int = 9,
    method: Method = "kmeans",
    pool: Pool = "mean",
    min_cluster_size: int = 5,
    standardise: bool = True,
    n_permutations: int = 500,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> Clusters:
    """Group series, positions or latents by what the model makes of them.

    Answers "does the model's inside fall into groups, and are they the classes?". The agreement
    with the labels stands beside its permutation null (labels shuffled over series, so that
    positions of one series stay together) and beside the same clustering of the raw input.
    Padded positions are used nowhere.

    What can mislead: k-means finds ``n_clusters`` round groups in anything, so look at the
    silhouette and the null; a low p says that clusters go with classes *somewhat*, the size is the
    ARI; series that the model was trained on fall apart more clearly than others; k-means on many
    standardised dimensions is led by how many of them say the same.

    Args:
        model: the model.
        data: the series.
        hook: hook point, a full name or a short one with a single place; None with ``sae``.
        sae: a dictionary: its latents are clustered in place of the activation.
        what: ``"series"`` (one vector per series, pooled), ``"positions"`` (one per observed
            position) or ``"latents"`` (units of the activation, or of ``sae``: those that rise and
            fall together; units that never vary are left out).
        n_clusters: of k-means; HDBSCAN finds its own number.
        method: ``"kmeans"`` or ``"hdbscan"``, both scikit-learn's.
        pool: of positions, for ``what="series"``: ``"mean"``, ``"max"`` or ``"last"``.
        min_cluster_size: of HDBSCAN, which calls noise (-1) what belongs to no cluster; in the
            agreement noise counts as a cluster of its own.
        standardise: bring every dimension to mean 0 and spread 1 first (latents always are).
        n_permutations: shuffles of the labels; the smallest p is 1 / (n_permutations + 1).
        seed: of k-means and the shuffles.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Assignments with medoids on the raw series, agreement, frame and figure.

    Raises:
        ArgumentError: neither or both of hook and sae, more clusters than samples, or another
            option that is not possible.

    Source: Lloyd 1982 (k-means); Campello et al. 2013 (HDBSCAN); Hubert and Arabie 1985 (ARI);
        Vinh et al. 2010 (AMI).

    Example:
        >>> from tstlens import HookedTST, load_dataset, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> data = load_dataset("JapaneseVowels", split="test")
        >>> found = probing.clusters(model, data, hook="blocks.1.hook_resid_post", n_clusters=9)
        >>> found.agreement.p["ari"] < 0.01
        True
    """
    _check(hook, sae, what, method, n_permutations)
    check_pool(pool)
    read = {"batch_size": batch_size, "progress": progress}
    if sae is not None:
        found = latents(model, data, sae, **read)
    else:
        by_name = activations(model, data, cast(str, hook), **read)
        if len(by_name) > 1:
            raise ArgumentError(
                f"expected one hook point, got {hook!r}, which stands for {list(by_name)}"
            )
        found = next(iter(by_name.values()))
    points, places = _points(found, what, pool)
    if what == "latents" or standardise:
        points = _standardised(points)
    assigned = _assign(points, method, n_clusters, min_cluster_size, seed)
    labels = None
    if data.labels is not None and what != "latents":
        labels = data.labels.cpu().numpy()[places[:, 0]]
    agreement = None
    if labels is not None and data.labels is not None:
        raw = None
        if what == "series":
            given = _standardised(_raw(data))
            raw = _assign(given, method, n_clusters, min_cluster_size, seed)
        whole = data.labels.cpu().numpy()
        agreement = _agreement(assigned, places[:, 0], whole, raw, n_permutations, seed)
    return Clusters(
        assigned=assigned,
        places=places,
        points=points,
        what=what,
        hook=found.hook,
        agreement=agreement,
        labels=labels,
        class_names=data.class_names,
        silhouette=_silhouette(points, assigned, seed),
        data=data,
        spans=found.spans,
        profile=_profile(found, data, places, assigned) if what == "latents" else None,
        made={
            "model": model.cfg.model_name,
            "method": method,
            "pool": pool if what == "series" else None,
            "n_clusters": n_clusters if method == "kmeans" else None,
            "min_cluster_size": min_cluster_size if method == "hdbscan" else None,
            "standardise": standardise,
            "n_units": found.values.shape[-1],
            "of_dictionary": sae is not None,
            "noise": int((assigned < 0).sum()),
            "seed": seed,
        },
    )


def _check(hook: str | None, sae: Any, what: str, method: str, n_permutations: int) -> None:
    if (hook is None) == (sae is None):
        raise ArgumentError("give either hook=, or sae= (which knows its hook point)")
    if what not in ("series", "positions", "latents"):
        raise ArgumentError(f"expected what to be series, positions or latents, got {what!r}")
    if method not in ("kmeans", "hdbscan"):
        raise ArgumentError(f"expected method to be kmeans or hdbscan, got {method!r}")
    if n_permutations < 100:
        raise ArgumentError(f"expected n_permutations of at least 100, got {n_permutations}")


def _points(found: Activations, what: What, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    if what == "series":
        points = found.joined().pooled(pool)[:, 0]
        places = np.full((len(points), 3), -1)
        places[:, 0] = np.arange(len(points))
        return points.astype(np.float64), places
    rows, places = found.rows()
    if found.values.shape[1] == 1:
        places[:, 1] = -1
    if what == "positions":
        return rows.astype(np.float64), places
    units = rows.T.astype(np.float64)
    varies = np.flatnonzero(units.std(1) > 1e-9 * np.maximum(np.abs(units.mean(1)), 1e-30))
    if len(varies) < 2:
        raise ArgumentError(f"expected at least two units that vary, got {len(varies)}")
    units = units[varies] - units[varies].mean(1, keepdims=True)
    places = np.full((len(varies), 3), -1)
    places[:, 0] = varies
    # Of unit length, so that distance says correlation.
    return units / np.linalg.norm(units, axis=1, keepdims=True), places


@seeded(0)
def _standardised(points: Float[np.ndarray, "sample feature"]) -> np.ndarray:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit_transform(points)


@seeded(0)
def _assign(
    points: np.ndarray, method: Method, n_clusters: int, min_cluster_size: int, seed: int
) -> Int[np.ndarray, " sample"]:
    from sklearn import cluster

    library: Any = cluster  # whose stubs know only some types of the options
    if method == "hdbscan":
        if not 2 <= min_cluster_size <= len(points):
            raise ArgumentError(
                f"expected min_cluster_size in 2..{len(points)}, got {min_cluster_size}"
            )
        found = library.HDBSCAN(min_cluster_size=min_cluster_size, copy=True).fit_predict(points)
        return found.astype(np.int64)
    if not 1 <= n_clusters <= len(points):
        raise ArgumentError(f"expected n_clusters in 1..{len(points)}, got {n_clusters}")
    fitted = library.KMeans(n_clusters, n_init=10, random_state=seed).fit(points)
    return fitted.labels_.astype(np.int64)


def _raw(data: TimeSeriesData) -> Float[np.ndarray, "series feature"]:
    """Mean and spread of every channel over the observed samples."""
    values = data.series.double().cpu().numpy()
    seen = np.ones((len(data), data.n_time)) if data.mask is None else data.mask.cpu().numpy()
    weight = seen[:, None] / np.maximum(seen.sum(1), 1)[:, None, None]
    mean = (values * weight).sum(2)
    spread = np.sqrt((((values - mean[:, :, None]) ** 2) * weight).sum(2))
    return np.concatenate([mean, spread], 1)


@seeded(0)
def scores_of(assigned: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Adjusted Rand index, normalised and adjusted mutual information, by scikit-learn."""
    from sklearn.metrics import (
        adjusted_mutual_info_score,
        adjusted_rand_score,
        normalized_mutual_info_score,
    )

    return (
        float(adjusted_rand_score(labels, assigned)),
        float(normalized_mutual_info_score(labels, assigned)),
        float(adjusted_mutual_info_score(labels, assigned)),
    )


def _agreement(
    assigned: np.ndarray,
    series: np.ndarray,
    labels: np.ndarray,
    raw: np.ndarray | None,
    n_permutations: int,
    seed: int,
) -> Agreement:
    observed = scores_of(assigned, labels[series])
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [scores_of(assigned, generator.permutation(labels)[series]) for _ in range(n_permutations)]
    )
    reached = (drawn >= np.array(observed) - 1e-12).sum(0)
    p = (1 + reached) / (1 + n_permutations)
    null = {
        name: (float(drawn[:, at].mean()), float(np.quantile(drawn[:, at], 0.95)))
        for at, name in enumerate(SCORES)
    }
    input_ari = None if raw is None else scores_of(raw, labels)[0]
    by_name = {name: float(p[at]) for at, name in enumerate(SCORES)}
    return Agreement(*observed, by_name, null, input_ari, n_permutations)


@seeded(0)
def _silhouette(points: np.ndarray, assigned: np.ndarray, seed: int) -> float:
    from sklearn.metrics import silhouette_score

    kept = assigned >= 0
    n_found = len(np.unique(assigned[kept]))
    if not 2 <= n_found < kept.sum():
        return float("nan")
    size = MOST_SILHOUETTE if kept.sum() > MOST_SILHOUETTE else None
    return float(
        silhouette_score(points[kept], assigned[kept], sample_size=size, random_state=seed)
    )


def _profile(
    found: Activations, data: TimeSeriesData, places: np.ndarray, assigned: np.ndarray
) -> np.ndarray | None:
    if data.labels is None:
        return None
    mean = found.pooled("mean").mean(1)[:, places[:, 0]]  # [series, unit]
    largest = np.abs(found.rows()[0][:, places[:, 0]]).max(0)
    labels = data.labels.cpu().numpy()
    by_class = np.stack(
        [
            mean[labels == index].mean(0) / largest if (labels == index).any() else largest * np.nan
            for index in range(data.n_classes)
        ],
        axis=1,
    )  # [unit, class]
    count = int(assigned.max(initial=-1)) + 1
    return np.stack([by_class[assigned == index].mean(0) for index in range(count)])
