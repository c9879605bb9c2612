"""Clusters of activations and of latents, beside what shuffled labels and the raw input give.

The latents of a cluster can be kept or ablated inside the model, beside random latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import Count, Draws, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.model.activations import (
    Activations,
    Pool,
    activations,
    latents,
    layer_of,
    spliced,
)
from tstlens.probing.measures import MeasureOutput, check_task, score, task_name
from tstlens.randomness import seeded
from tstlens.results import TableResult
from tstlens.run import Runs

if TYPE_CHECKING:
    import pandas as pd


What = Literal["series", "positions", "latents"]


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well clusters go with labels, and how well they would by chance.

    Args:
        ari: adjusted Rand index; 1 for the same partition, 0 on average by chance.
        nmi: mutual information over the mean of both entropies; above 0 by chance.
        ami: adjusted mutual information; 0 on average by chance.
        p: permutation p-value of each, by name: labels shuffled over series.
        null: mean and 95th percentile of each under shuffled labels, by name.
        input_ari: of the same clustering of the raw input (mean and spread of every channel over
            the observed samples), or None.
        n_permutations: shuffles.
    """

    ari: float
    nmi: float
    ami: float
    p: dict[str, float]
    null: dict[str, tuple[float, float]]
    input_ari: float | None
    n_permutations: int


@dataclass(frozen=True, eq=False, repr=False)
class Clusters(TableResult):
    """Which samples (series or positions) or which latents belong together.

    Args:
        assigned: [sample] cluster of each series, position or latent; -1 for what HDBSCAN calls
            noise.
        places: [sample, 3] (series, channel, pos) of each; -1 where there is none. For latents the
            first column is the latent.
        points: [sample, feature] what was clustered.
        what: ``"series"``, ``"positions"`` or ``"latents"``.
        hook: hook point that was read.
        agreement: with the labels; None for latents, or data without labels.
        labels: [sample] the class of each sample's series, or None.
        class_names: of the labels.
        silhouette: mean silhouette of what was clustered, -1 to 1; NaN for one cluster.
        data: the series.
        spans: (first, one past last) sample that every position was embedded from, or None.
        profile: [cluster, class] mean activation of a cluster's latents in the series of each
            class (latents only), in units of the latent's largest.
        made: how.
    """

    assigned: Int[np.ndarray, " sample"]
    places: Int[np.ndarray, "sample 3"]
    points: Float[np.ndarray, "sample feature"]
    what: What
    hook: str
    agreement: Agreement | None
    labels: Int[np.ndarray, " sample"] | None
    class_names: tuple[str, ...]
    silhouette: float
    data: TimeSeriesData
    spans: tuple[tuple[int, int], ...] | None = None
    profile: Float[np.ndarray, "cluster class"] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def n_clusters(self) -> int:
        """Clusters that were found; noise is none."""
        return int(self.assigned.max(initial=-1)) + 1

    @property
    def sizes(self) -> Int[np.ndarray, " cluster"]:
        """Members of every cluster."""
        return np.bincount(self.assigned[self.assigned >= 0], minlength=self.n_clusters)

    @checked
    def members(self, cluster: int) -> Int[np.ndarray, " member"]:
        """Indices of the samples (or latents) of a cluster, nearest to its middle first.

        The first one is the *medoid*.

        Raises:
            ArgumentError: no such cluster.
        """
        if not 0 <= cluster < self.n_clusters:
            raise ArgumentError(f"expected a cluster in 0..{self.n_clusters - 1}, got {cluster}")
        own = np.flatnonzero(self.assigned == cluster)
        middle = self.points[own].mean(0)
        distance = ((self.points[own] - middle) ** 2).sum(1)
        return own[np.argsort(distance, kind="stable")]

    @checked
    def medoids(self, n: Count = 1) -> pd.DataFrame:
        """The ``n`` samples nearest to the middle of every cluster, on the raw series.

        Returns:
            ``cluster``, ``rank``, ``series``, ``channel`` and ``pos`` (-1 where there is none),
            ``start`` and ``stop`` (samples that were embedded there; the whole series where it was
            pooled) and ``label``. At most one position per series. For latents: ``cluster``,
            ``rank``, ``latent``.
        """
        import pandas as pd

        rows = []
        for cluster in range(self.n_clusters):
            seen: set[int] = set()
            for index in self.members(cluster):
                place = self.places[index]
                if int(place[0]) in seen:
                    continue
                seen.add(int(place[0]))
                rows.append(self._row(cluster, len(seen) - 1, int(index)))
                if len(seen) == n:
                    break
        return pd.DataFrame(rows)

    def _row(self, cluster: int, rank: int, index: int) -> dict[str, Any]:
        series, channel, pos = (int(one) for one in self.places[index])
        if self.what == "latents":
            return {"cluster": cluster, "rank": rank, "latent": series}
        span = (0, int(self.data.lengths[series]))
        if pos >= 0 and self.spans is not None:
            span = self.spans[pos]
        label = None if self.labels is None else self.class_names[int(self.labels[index])]
        return {
            "cluster": cluster,
            "rank": rank,
            "series": series,
            "channel": channel,
            "pos": pos,
            "start": span[0],
            "stop": span[1],
            "label": label,
        }

    def contingency(self) -> pd.DataFrame:
        """How many samples of each class every cluster holds.

        Raises:
            ArgumentError: there are no labels, or latents were clustered.
        """
        import pandas as pd

        if self.labels is None:
            raise ArgumentError("these clusters have no labels to be compared with")
        clusters = sorted(set(self.assigned.tolist()))
        table = np.zeros((len(clusters), len(self.class_names)), dtype=np.int64)
        np.add.at(table, (np.searchsorted(clusters, self.assigned), self.labels), 1)
        index = pd.Index(clusters, name="cluster")
        return pd.DataFrame(table, index=index, columns=pd.Index(self.class_names, name="class"))

    def _rows(self) -> dict[str, Any]:
        """One per series, position or latent, with its ``cluster``."""
        if self.what == "latents":
            return {"latent": self.places[:, 0], "cluster": self.assigned}
        rows = {name: self.places[:, at] for at, name in enumerate(("series", "channel", "pos"))}
        rows["cluster"] = self.assigned
        names = {} if self.labels is None else {"label": [self.class_names[i] for i in self.labels]}
        return rows | names

    def __repr__(self) -> str:
        said = f"Clusters({self.n_clusters} of {len(self.assigned)} {self.what} at {self.hook}"
        if self.agreement is not None:
            found = self.agreement
            said += f", ARI {found.ari:.3f} (p {found.p['ari']:.3g}), AMI {found.ami:.3f}"
        return said + f", silhouette {self.silhouette:.2f})"


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
    n_clusters: Count = 9,
    method: Method = "kmeans",
    pool: Pool = "mean",
    min_cluster_size: int = 5,
    standardise: bool = True,
    n_permutations: Draws = 500,
    seed: Seed = 0,
    batch_size: Count = 128,
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
    if (hook is None) == (sae is None):
        raise ArgumentError("give either hook=, or sae= (which knows its hook point)")
    read = {"batch_size": batch_size, "progress": progress}
    if sae is not None:
        found = latents(model, sae, data, **read)
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
    if n_clusters > len(points):
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


Mode = Literal["ablate", "keep"]


@dataclass(frozen=True, eq=False, repr=False)
class ClusterEffect(Labelled):
    """What becomes of the task when a cluster's latents are ablated, or kept alone.

    Args:
        value: [cluster] mean metric over the series.
        accuracy: [cluster] share of series whose class is right; NaN for forecasts.
        random_value: [cluster, draw] the same with random latents of the same number.
        random_accuracy: [cluster, draw].
        by_class: [cluster, class] mean metric over the series of each class; None without labels.
        full: (metric, accuracy) with all latents.
        none: (metric, accuracy) with no latent.
        full_by_class: [class] mean metric with all latents, or None.
        sizes: latents in every cluster.
        p: [cluster] share of random draws that hurt as much (ablating), or serve as well (keeping).
        mode: ``"ablate"`` or ``"keep"``.
        metric: name of the metric.
        class_names: of the labels.
        hook: hook point of the latents.
        made: how.
    """

    value: Float[np.ndarray, " cluster"]
    accuracy: Float[np.ndarray, " cluster"]
    random_value: Float[np.ndarray, "cluster draw"]
    random_accuracy: Float[np.ndarray, "cluster draw"]
    by_class: Float[np.ndarray, "cluster class"] | None
    full: tuple[float, float]
    none: tuple[float, float]
    full_by_class: Float[np.ndarray, " class"] | None
    sizes: tuple[int, ...]
    p: Float[np.ndarray, " cluster"]
    mode: Mode
    metric: str
    class_names: tuple[str, ...]
    hook: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def random_ends(self) -> Float[np.ndarray, "end cluster"]:
        """2.5 and 97.5 percentiles of the metric with random latents."""
        return np.quantile(self.random_value, [0.025, 0.975], axis=1)

    def entries(self) -> dict[str, Sequence[int]]:
        """The clusters."""
        return {"cluster": range(len(self.value))}

    def columns(self) -> dict[str, Any]:
        """Latents, metric and accuracy beside those of random latents, of all and of none; p."""
        low, high = self.random_ends
        return {
            "size": self.sizes,
            "value": self.value,
            "random": self.random_value.mean(1),
            "random_low": low,
            "random_high": high,
            "accuracy": self.accuracy,
            "random_accuracy": self.random_accuracy.mean(1),
            "p": self.p,
            "full_value": self.full[0],
            "full_accuracy": self.full[1],
            "none_value": self.none[0],
            "none_accuracy": self.none[1],
        }

    def __repr__(self) -> str:
        return (
            f"ClusterEffect({self.mode} {len(self.value)} clusters at {self.hook}, {self.metric}: "
            f"all latents {self.full[0]:.4g}, none {self.none[0]:.4g})"
        )


@checked
def cluster_effect(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    found: Clusters,
    *,
    mode: Mode = "ablate",
    metric: MeasureOutput | None = None,
    use_error_term: bool | None = None,
    n_draws: Count = 20,
    seed: Seed = 0,
    batch_size: Count = 256,
    progress: bool = True,
) -> ClusterEffect:
    """Ablate a cluster's latents inside the model, or keep them alone, and look at the task.

    Answers "does the model's decision rest on this group of latents?". The dictionary is spliced
    in, latents are set to zero at every position, and everything downstream is computed anew. The
    control are as many latents drawn at random among those that vary on the data.

    What can mislead: a cluster of strong or frequent latents changes more than random ones for that
    alone; others may make up for what is ablated; with ``mode="keep"`` and without the error term
    the stream is far from what the model was trained on, so compare with ``none``.

    Args:
        model: the model.
        sae: the dictionary that the latents belong to.
        data: series to run.
        found: of :func:`clusters` with ``sae=`` and ``what="latents"``.
        mode: ``"ablate"`` sets the cluster's latents to zero, ``"keep"`` all others.
        metric: from outputs [batch, ...] of all series to one number per series, larger for
            better; None for the log-probability of the true class, in nats.
        use_error_term: add what the dictionary misses; None does so for ``"ablate"`` only.
        n_draws: random groups per cluster.
        seed: of the draws.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Metric and accuracy per cluster, beside random groups, all latents and none.

    Raises:
        ArgumentError: clusters of something else than this dictionary's latents, or another mode.
        LabelError: no metric, and no labels or no classifier.

    Example:
        >>> from tstlens import probing
        >>> groups = probing.clusters(model, data, sae=sae, what="latents")  # doctest: +SKIP
        >>> probing.cluster_effect(model, sae, data, groups).to_dataframe()  # doctest: +SKIP
    """
    if found.what != "latents" or not found.made.get("of_dictionary"):
        raise ArgumentError(
            "expected clusters of a dictionary's latents: clusters(model, data, sae=sae, "
            f"what='latents'), got clusters of {found.what} at {found.hook}"
        )
    n_latents = int(found.made["n_units"])
    groups = [found.places[found.assigned == at, 0] for at in range(found.n_clusters)]
    generator = np.random.default_rng(seed)
    alive = found.places[:, 0]
    error = mode == "ablate" if use_error_term is None else use_error_term
    data = data.for_model(model)
    with spliced(model, sae, error) as point:
        if point != found.hook:
            raise ArgumentError(f"expected clusters at {point}, got clusters at {found.hook}")

        runs = Runs(model, data, start=layer_of(point), batch_size=batch_size)

        def run(kept: Tensor | None) -> Tensor:
            def only(latents: Tensor, hook: Any) -> Tensor:
                if kept is None or latents.shape[-1] != n_latents:
                    raise ArgumentError(
                        f"expected a dictionary of {n_latents} latents, got {latents.shape[-1]}"
                    )
                return latents * kept.to(latents)

            return runs.outputs([] if kept is None else [(point, only)])

        def kept_of(group: Sequence[int] | np.ndarray) -> Tensor:
            chosen = torch.zeros(n_latents)
            chosen[torch.as_tensor(np.asarray(group), dtype=torch.long)] = 1
            return chosen if mode == "keep" else 1 - chosen

        whole = run(None)
        check_task(data, whole, metric)
        full, empty = (score(data, out, metric) for out in (whole, run(torch.zeros(n_latents))))
        own, random = [], []
        bar = tqdm(total=len(groups) * (n_draws + 1), desc="clusters", disable=not progress)
        with bar:
            for group in groups:
                own.append(score(data, run(kept_of(group)), metric))
                bar.update()
                draws = []
                for _ in range(n_draws):
                    drawn = generator.choice(alive, len(group), replace=False)
                    value, right = score(data, run(kept_of(drawn)), metric)
                    draws.append((float(value.mean()), float(right.mean())))
                    bar.update()
                random.append(draws)
    value = np.array([float(one[0].mean()) for one in own])
    drawn_values = np.array(random)  # [cluster, draw, 2]
    sign = 1 if mode == "keep" else -1
    as_good = (sign * drawn_values[:, :, 0] >= sign * value[:, None]).sum(1)
    return ClusterEffect(
        value=value,
        accuracy=np.array([float(one[1].mean()) for one in own]),
        random_value=drawn_values[:, :, 0],
        random_accuracy=drawn_values[:, :, 1],
        by_class=_by_class(data, [one[0] for one in own]),
        full=(float(full[0].mean()), float(full[1].mean())),
        none=(float(empty[0].mean()), float(empty[1].mean())),
        full_by_class=None if data.labels is None else _by_class(data, [full[0]])[0],  # type: ignore[index]
        sizes=tuple(len(group) for group in groups),
        p=(1 + as_good) / (1 + n_draws),
        mode=mode,
        metric=task_name(metric),
        class_names=data.class_names,
        hook=found.hook,
        made={"use_error_term": error, "n_draws": n_draws, "seed": seed, "n_series": len(data)},
    )


def _by_class(data: TimeSeriesData, values: list[Tensor]) -> np.ndarray | None:
    if data.labels is None:
        return None
    labels = data.labels.cpu()
    return np.array(
        [
            [float(value[labels == index].mean()) for index in range(data.n_classes)]
            for value in values
        ]
    )
