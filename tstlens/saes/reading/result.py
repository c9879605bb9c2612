"""What was found out about the latents of one dictionary, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.results import PagedResult
from tstlens.saes.reading.activity import Activity
from tstlens.saes.reading.association import ClassAssociation
from tstlens.saes.reading.effects import OutputEffects
from tstlens.saes.reading.properties import PropertyAssociation
from tstlens.saes.reading.windows import Spans, Windows, top_windows

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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
        """One latent on the series, or an overview of all latents where none is given.

        Args:
            latent: which one.
            **options: of the drawing: ``n`` windows, ``title``.
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
