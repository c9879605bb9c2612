"""What linear probes found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from tstlens.probing.extraction import layer_of
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult(Result):
    """Held-out scores of linear probes over hook points, positions and heads, with controls.

    Args:
        values: [*axes] accuracy on held-out series, or R² for targets that are numbers; NaN where
            there was nothing to fit (a position that fewer than two classes observe).
        low: [*axes] lower end of the interval over held-out series.
        high: [*axes] upper end.
        baseline: [*axes] score of always naming the training split's most frequent class (or its
            mean), on the same rows.
        shuffled: [shuffle, *axes] scores when series exchange their targets, fitted and scored so.
        p: [*axes] that the probe is no better than ``baseline`` (one-sided, series as the unit).
        q: [*axes] p after Benjamini and Hochberg over all cells.
        n_train: [*axes] training rows.
        n_test: [*axes] rows scored; with cross-validation each once.
        axes: names of the axes: ``"hook"``, then ``"head"`` and ``"pos"`` where asked for.
        coords: entries of every axis; hooks by their full names.
        score: ``"accuracy"`` or ``"R²"``.
        target: what was read off.
        class_names: of the target; () for numbers.
        level: coverage of the intervals.
        time_cells: first and one-past-last sample of every position, or None.
        made: how.
    """

    values: Float[np.ndarray, "*cell"]
    low: Float[np.ndarray, "*cell"]
    high: Float[np.ndarray, "*cell"]
    baseline: Float[np.ndarray, "*cell"]
    shuffled: Float[np.ndarray, "*shuffle_and_cell"]
    p: Float[np.ndarray, "*cell"]
    q: Float[np.ndarray, "*cell"]
    n_train: Int[np.ndarray, "*cell"]
    n_test: Int[np.ndarray, "*cell"]
    axes: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    score: str
    target: str
    class_names: tuple[str, ...] = ()
    level: float = 0.95
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def selectivity(self) -> Float[np.ndarray, "*cell"]:
        """[*axes] the score less its mean under shuffled targets (Hewitt and Liang 2019)."""
        return self.values - self.shuffled.mean(0)

    @property
    def best(self) -> dict[str, Any]:
        """The cell of the highest score, as a row of :meth:`to_dataframe`."""
        frame: Any = self.to_dataframe()
        return frame.loc[frame["score"].idxmax()].to_dict()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell.

        ``hook``, ``layer``, ``head`` and ``pos`` where asked for; ``score`` with ``low`` and
        ``high``; ``baseline``; ``shuffled`` (mean) with ``shuffled_sd``; ``selectivity``; ``p``
        and ``q``; ``n_train`` and ``n_test`` rows.
        """
        import pandas as pd

        index = pd.MultiIndex.from_product([self.coords[axis] for axis in self.axes])
        frame = pd.DataFrame(index.to_list(), columns=list(self.axes))
        frame.insert(1, "layer", [layer_of(name) for name in frame["hook"]])
        n_shuffles = len(self.shuffled)
        columns: dict[str, np.ndarray] = {
            "score": self.values,
            "low": self.low,
            "high": self.high,
            "baseline": self.baseline,
            "shuffled": self.shuffled.mean(0),
            "shuffled_sd": self.shuffled.std(0, ddof=1) if n_shuffles > 1 else self.values * np.nan,
            "selectivity": self.selectivity,
            "p": self.p,
            "q": self.q,
            "n_train": self.n_train,
            "n_test": self.n_test,
        }
        return frame.assign(**{name: values.ravel() for name, values in columns.items()})

    def __repr__(self) -> str:
        sizes = zip(self.axes, self.values.shape, strict=True)
        shape = ", ".join(f"{axis}={size}" for axis, size in sizes)
        known = np.isfinite(self.values)
        best = f"{self.values[known].max():.3f}" if known.any() else "nothing"
        return (
            f"ProbeResult({self.target} [{shape}], best {self.score} {best}, "
            f"shuffled {np.nanmean(self.shuffled):.3f})"
        )
