"""What was found out about the latents of one dictionary, as plain data.

How well each latent tells the classes apart, and how well it would by chance.

Which property of the window a latent follows, tested on series that did not pick it.

Properties of the window of every latent's slot: level, slope, variance, frequencies, place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import widened
from tstlens.data.window_properties import window_properties as properties_of_windows
from tstlens.errors import ArgumentError, LabelError
from tstlens.results import PagedResult
from tstlens.saes.reading.activity import Activity, Spans, Windows, top_windows
from tstlens.saes.reading.intervention import OutputEffects
from tstlens.stats import adjusted, clustered_correlation

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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


@dataclass(frozen=True, eq=False)
class WindowProperties:
    """Properties of the window of every slot.

    Args:
        values: [series, slot of a series, property].
        names: of the properties.
        weight: [series, slot of a series], 1 where the position is observed, else 0.
        length: samples that a window spans in the middle of a series.
    """

    values: Float[np.ndarray, "series slot property"]
    names: tuple[str, ...]
    weight: Float[np.ndarray, "series slot"]
    length: int


def window_properties(data: TimeSeriesData, activity: Activity, spans: Spans) -> WindowProperties:
    """Level, slope, variance, power in three frequency bands and place of every window.

    See :func:`tstlens.data.window_properties.window_properties`. For models that mix channels
    there is one set per channel (up to 32 channels) and one for the mean over channels; for models
    that read each channel by itself there is the channel's own, and one indicator per channel.
    """
    values, names = properties_of_windows(data, spans, per_channel=activity.n_channels > 1)
    weight = activity.observed.reshape(activity.n_series, -1).astype(float)
    length = max(b - a for a, b in widened(spans, data.n_time))
    return WindowProperties(values, names, weight, length)


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


@dataclass(frozen=True, eq=False, repr=False)
class Features(PagedResult):
    """Every latent of a dictionary with what it responds to and what it does.

    Args:
        activity: activations of every latent over (series, channel, position).
        data: the series that they are of.
        spans: (first, one past last) sample that every position was embedded from.
        cells: the samples that figures draw a position at; they tile time.
        directions: [latent, d_in] what one unit of each latent adds to the activation.
        classes: association with the classes; None for data without labels.
        properties: association with properties of the window.
        effects: change of the output when a latent is removed; None where not asked for.
        monosemanticity: one row each for this dictionary, a random one and the neurons.
        outputs: class names, or steps of the forecast.
        hook: hook point that is read.
        name: of the dictionary.
        made: how.
        kind: ``"latents"`` of an SAE, or ``"codes"`` of a codebook.
    """

    activity: Activity
    data: TimeSeriesData
    spans: Spans
    cells: Spans
    directions: Float[np.ndarray, "latent d_in"]
    classes: ClassAssociation | None
    properties: PropertyAssociation | None
    effects: OutputEffects | None
    monosemanticity: pd.DataFrame
    outputs: tuple[str, ...]
    hook: str
    name: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    kind: Literal["latents", "codes"] = "latents"

    @property
    def n_latents(self) -> int:
        """Latents of the dictionary, dead ones included."""
        return self.activity.n_latents

    def top_windows(self, latent: int, n: int = 9) -> Windows:
        """Where a latent is strongest, at most one window per series (and channel).

        Args:
            latent: which one.
            n: windows; fewer where it is active in fewer series.

        Raises:
            ArgumentError: no such latent, or n below 1.
        """
        return top_windows(self.activity, self.data, self.spans, self.cells, latent, n, self.hook)

    def over_time(self, latent: int) -> Float[np.ndarray, "series channel pos"]:
        """A latent's activation at every position, NaN at padding."""
        return self.activity.of(latent)

    def neighbours(self, latent: int, n: int = 5) -> pd.DataFrame:
        """The latents with the most similar directions.

        Args:
            latent: which one.
            n: how many.

        Returns:
            latent, cosine (of directions) and correlation (of activations), nearest first.
        """
        import pandas as pd

        self.activity.check(latent)
        cosine = self._unit() @ self._unit()[latent]
        cosine[latent] = -np.inf
        order = np.argsort(-cosine, kind="stable")[: min(n, self.n_latents - 1)]
        own = np.nan_to_num(self.activity.of(latent)).ravel()[self.activity.observed]
        values = []
        for other in order:
            column = np.nan_to_num(self.activity.of(int(other))).ravel()[self.activity.observed]
            constant = own.std() == 0 or column.std() == 0
            values.append(float("nan") if constant else float(np.corrcoef(own, column)[0, 1]))
        return pd.DataFrame({"latent": order, "cosine": cosine[order], "correlation": values})

    def nearest(self, chunk: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """The latent with the most similar direction to each, and the cosine."""
        unit = self._unit()
        who = np.zeros(len(unit), dtype=np.int64)
        cosine = np.full(len(unit), np.nan)
        for start in range(0, len(unit) if len(unit) > 1 else 0, chunk):
            part = unit[start : start + chunk] @ unit.T
            part[np.arange(len(part)), start + np.arange(len(part))] = -np.inf
            who[start : start + chunk] = part.argmax(1)
            cosine[start : start + chunk] = part.max(1)
        return who, cosine

    def table(self) -> pd.DataFrame:
        """One row per latent, in order.

        ``head`` and latent ``of_head`` where a dictionary reads heads one by one; ``density``
        (share of observed positions), ``series`` in which it is active, ``mean`` and ``max``
        activation where active; the ``class`` of the furthest AUC from chance with ``auc``
        and ``q_class``; the window ``property`` it follows with ``r``, ``r_heldout``,
        ``q_property`` and ``confirmed``; ``moves`` (the class or forecast step that its removal
        changes most), ``effect`` (by how much: logits, or the forecast's units) and ``effect_size``
        (root mean square over all outputs); ``nearest`` latent and ``cosine``.
        """
        import pandas as pd

        values = self.activity.values
        count = np.diff(values.indptr)
        column = np.repeat(np.arange(self.n_latents), count)
        total = np.bincount(column, weights=values.data, minlength=self.n_latents)
        largest = np.zeros(self.n_latents)
        np.maximum.at(largest, column, values.data)
        per_series = self.activity.n_channels * self.activity.n_pos
        pairs = np.unique(column * self.activity.n_series + values.indices // per_series)
        frame: dict[str, Any] = {}
        if n_heads := self.made.get("n_heads"):
            frame["head"], frame["of_head"] = np.divmod(
                np.arange(self.n_latents), self.n_latents // n_heads
            )
        frame |= {
            "density": self.activity.density,
            "series": np.bincount(pairs // self.activity.n_series, minlength=self.n_latents),
            "mean": total / np.maximum(count, 1),
            "max": largest,
        }
        alive = count > 0
        if self.classes is not None:
            frame["class"] = _named(self.data.class_names, self.classes.best, alive)
            frame["auc"] = np.where(alive, self.classes.best_auc(), np.nan)
            frame["q_class"] = self.classes.q
        if self.properties is not None:
            names = self.properties.names
            frame["property"] = _named(names, self.properties.best, alive)
            for name in ("r", "r_heldout", "q"):
                key = "q_property" if name == "q" else name
                frame[key] = self.properties.of_best(name)
            frame["confirmed"] = self.properties.confirmed
        if self.effects is not None:
            change = np.nan_to_num(self.effects.change)
            at = np.abs(change).argmax(1)
            frame["moves"] = _named(self.outputs, at, alive & (self.effects.n_series > 0))
            frame["effect"] = self.effects.change[np.arange(len(at)), at]
            frame["effect_size"] = self.effects.size
        frame["nearest"], frame["cosine"] = self.nearest()
        return pd.DataFrame(frame).rename_axis("latent")

    def to_dataframe(self) -> pd.DataFrame:
        """The same as :meth:`table`."""
        return self.table()

    def figure(self, latent: int | None = None, **options: Any) -> go.Figure:
        """One latent on the series, a series' latents, or an overview where neither is given.

        Args:
            latent: which one.
            **options: of the drawing: ``series`` (which one, for its latents over time; ``channel``
                of it), ``n`` windows or latents, ``title``.
        """
        if latent is None:
            return super().figure(**options)
        self.activity.check(latent)
        return super().figure(latent=latent, **options)

    def _unit(self) -> np.ndarray:
        norm = np.linalg.norm(self.directions, axis=1, keepdims=True)
        return self.directions / np.where(norm > 0, norm, 1)

    def __repr__(self) -> str:
        alive = int((self.activity.density > 0).sum())
        return (
            f"Features({self.name or 'dictionary'} at {self.hook}, {self.n_latents} latents, "
            f"{alive} active on {len(self.data)} series, l0 {self.activity.l0:.1f})"
        )


def _named(names: Sequence[str], index: np.ndarray, alive: np.ndarray) -> list[Any]:
    if len(index) and int(index.max()) >= len(names):
        raise ArgumentError(f"expected a name for each of {int(index.max()) + 1}, got {len(names)}")
    return [names[one] if here else None for one, here in zip(index, alive, strict=True)]
