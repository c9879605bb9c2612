"""Clusters of samples or of latents, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.results import Result

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
class Clusters(Result):
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
    def medoids(self, n: int = 1) -> pd.DataFrame:
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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per series, position or latent, with its ``cluster``."""
        import pandas as pd

        if self.what == "latents":
            return pd.DataFrame({"latent": self.places[:, 0], "cluster": self.assigned})
        frame = pd.DataFrame(self.places, columns=["series", "channel", "pos"])
        frame["cluster"] = self.assigned
        if self.labels is not None:
            frame["label"] = [self.class_names[index] for index in self.labels]
        return frame

    def __repr__(self) -> str:
        said = f"Clusters({self.n_clusters} of {len(self.assigned)} {self.what} at {self.hook}"
        if self.agreement is not None:
            found = self.agreement
            said += f", ARI {found.ari:.3f} (p {found.p['ari']:.3g}), AMI {found.ami:.3f}"
        return said + f", silhouette {self.silhouette:.2f})"
