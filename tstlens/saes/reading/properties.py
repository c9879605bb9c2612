"""Which property of the window a latent follows, tested on series that did not pick it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tstlens.errors import ArgumentError
from tstlens.saes.reading.activity import Activity
from tstlens.saes.reading.window_properties import WindowProperties
from tstlens.stats import adjusted, clustered_correlation

FEWEST = 4  # series, two on each side of the split
LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class PropertyAssociation:
    """Pearson correlation of each latent with each property of its window.

    Args:
        names: of the properties.
        r: [latent, property] on the half of the series that properties are picked on; NaN where
            a latent or a property is constant.
        q: [latent, property] after Benjamini and Hochberg over all latents and properties.
        r_heldout: [latent, property] on the other half.
        p_heldout: [latent, property] there, not corrected: meant for the one picked property.
        best: [latent] the property of the largest |r| among those with q <= 0.05, else of all.
        confirmed: [latent] the best property has q <= 0.05, and on the held-out half the same
            sign and p <= 0.05.
        heldout: indices of the held-out series.
        window_length: samples of a window.
    """

    names: tuple[str, ...]
    r: Float[np.ndarray, "latent property"]
    q: Float[np.ndarray, "latent property"]
    r_heldout: Float[np.ndarray, "latent property"]
    p_heldout: Float[np.ndarray, "latent property"]
    best: Int[np.ndarray, " latent"]
    confirmed: Bool[np.ndarray, " latent"]
    heldout: Int[np.ndarray, " series_out"]
    window_length: int

    def of_best(self, name: str) -> Float[np.ndarray, " latent"]:
        """``r``, ``q``, ``r_heldout`` or ``p_heldout`` of the best property of every latent."""
        return getattr(self, name)[np.arange(len(self.best)), self.best]


def property_association(
    activity: Activity, properties: WindowProperties, *, seed: int = 0
) -> PropertyAssociation:
    """Whether a latent's activation follows a property of the samples under it.

    Positions of one series are alike, so p-values take the *series* as the unit: the covariance is
    a sum over series, and a t test asks whether these per-series sums are 0 on average
    (cluster-robust; as many degrees of freedom as series less one). Half of the series pick
    properties under false-discovery control, the other half confirms the one picked.

    What can mislead: the window is what the position was *embedded* from; attention of earlier
    layers has brought in the rest of the series, so a low r does not mean that the latent is
    arbitrary. Pearson sees straight lines only. Properties correlate with each other, so the best
    one may stand for another.

    Args:
        activity: of the latents.
        properties: of the windows.
        seed: of the split.

    Raises:
        ArgumentError: fewer than 4 series.

    Source: Pearson 1895; Liang and Zeger 1986 (clusters); Benjamini and Hochberg 1995.
    """
    n_series = activity.n_series
    if n_series < FEWEST:
        raise ArgumentError(
            f"expected at least {FEWEST} series to split in two halves, got {n_series}"
        )
    order = np.random.default_rng(seed).permutation(n_series)
    picking, heldout = np.sort(order[: n_series // 2]), np.sort(order[n_series // 2 :])
    r, p = correlations(activity, properties, picking)
    r_heldout, p_heldout = correlations(activity, properties, heldout)
    q = adjusted(p)
    size = np.nan_to_num(np.abs(r))
    best = (size + 2 * (np.nan_to_num(q, nan=1.0) <= LEVEL)).argmax(1)
    at = np.arange(len(best)), best
    with np.errstate(invalid="ignore"):
        confirmed = (
            (q[at] <= LEVEL) & (np.sign(r[at]) == np.sign(r_heldout[at])) & (p_heldout[at] <= LEVEL)
        )
    return PropertyAssociation(
        properties.names,
        r,
        q,
        r_heldout,
        p_heldout,
        best,
        confirmed,
        heldout,
        properties.length,
    )


def correlations(
    activity: Activity,
    properties: WindowProperties,
    series: Int[np.ndarray, " chosen"],
    chunk: int = 64,
) -> tuple[Float[np.ndarray, "latent property"], Float[np.ndarray, "latent property"]]:
    """Pearson r over the observed positions of some series, and p with series as the unit."""
    weight = properties.weight[series]  # [series, slot]
    standard = properties.values[series]
    slots = weight.shape[1]
    rows = (series[:, None] * slots + np.arange(slots)).ravel()
    by_row = activity.values.tocsr()[rows].tocsc()
    parts = []
    for start in range(0, activity.n_latents, chunk):
        part = by_row[:, start : start + chunk].toarray().astype(float)
        part = part.reshape(len(series), slots, -1)
        parts.append(clustered_correlation(part, standard, weight))
    r, p = (np.concatenate(part) for part in zip(*parts, strict=True))
    return r, p
