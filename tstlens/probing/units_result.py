"""Which predictors hidden units and latents follow, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

NEURONS = "neurons"


@dataclass(frozen=True, eq=False)
class Found:
    """One kind of units: the neurons of a hook point, or the latents of a dictionary.

    Args:
        r: [seed, unit, predictor] Pearson correlation on the half that predictors are found on;
            NaN where either is constant.
        q: [seed, unit, predictor] after Benjamini and Hochberg over all pairs.
        r_heldout: [seed, unit, predictor] on the other half.
        confirmed: [seed, unit, predictor] found on one half and confirmed on the other.
        distinct: [seed, unit] confirmed predictors, near-copies of a stronger one left out.
        by_position: [seed, unit] the same count when windows come from other series: what a unit
            follows through the position alone.
        alive: [seed, unit] whether the unit varies on both halves.
    """

    r: Float[np.ndarray, "seed unit predictor"]
    q: Float[np.ndarray, "seed unit predictor"]
    r_heldout: Float[np.ndarray, "seed unit predictor"]
    confirmed: Bool[np.ndarray, "seed unit predictor"]
    distinct: Int[np.ndarray, "seed unit"]
    by_position: Int[np.ndarray, "seed unit"]
    alive: Bool[np.ndarray, "seed unit"]

    @property
    def counts(self) -> Int[np.ndarray, "seed unit"]:
        """Confirmed predictors per unit."""
        return self.confirmed.sum(2)


@dataclass(frozen=True, eq=False, repr=False)
class Units(Result):
    """Units against predictors of the input window, for neurons and dictionaries, over seeds.

    Args:
        kinds: what was found, by name: ``"neurons"`` and every dictionary.
        predictors: names.
        hook: hook point of the neurons.
        seeds: of the splits.
        level: of the false discovery rate.
        least_r: the least |r| that counts, on both halves.
        made: how.
    """

    kinds: Mapping[str, Found]
    predictors: tuple[str, ...]
    hook: str
    seeds: tuple[int, ...]
    level: float
    least_r: float
    made: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> pd.DataFrame:
        """One row per kind of units; means over seeds, ``_low`` and ``_high`` over seeds.

        ``units`` that vary; ``explained`` share with a confirmed predictor; ``predictors`` per
        unit; ``distinct`` of them (near-copies left out); ``by_position``: per unit with other
        series' windows; ``single``: share of explained units with one distinct predictor; ``r``:
        median held-out |r| of the strongest confirmed predictor; ``gain``: distinct predictors per
        explained neuron over those per explained unit of this kind, above 1 where these units
        stand for fewer things.
        """
        import pandas as pd

        base = self._per_explained(self.kinds[NEURONS])
        rows = []
        for name, found in self.kinds.items():
            alive = np.maximum(found.alive.sum(1), 1)
            explained = (found.counts > 0) & found.alive
            n_explained = explained.sum(1)
            single = ((found.distinct == 1) & explained).sum(1) / np.maximum(n_explained, 1)
            columns = {
                "explained": n_explained / alive,
                "predictors": (found.counts * found.alive).sum(1) / alive,
                "distinct": (found.distinct * found.alive).sum(1) / alive,
                "by_position": (found.by_position * found.alive).sum(1) / alive,
                "single": np.where(n_explained > 0, single, np.nan),
                "r": self._strongest(found),
                "gain": base / self._per_explained(found),
            }
            row: dict[str, Any] = {"kind": name, "units": int(found.alive.sum(1).mean())}
            for key, values in columns.items():
                row[key], row[f"{key}_low"], row[f"{key}_high"] = _over_seeds(values)
            rows.append(row)
        return pd.DataFrame(rows).set_index("kind")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per confirmed pair: ``seed``, ``kind``, ``unit``, ``predictor``, ``r``, ``q``
        and ``r_heldout``."""
        import pandas as pd

        parts = []
        for name, found in self.kinds.items():
            seed, unit, predictor = np.nonzero(found.confirmed)
            columns = {
                "seed": np.array(self.seeds)[seed],
                "kind": name,
                "unit": unit,
                "predictor": np.array(self.predictors, dtype=object)[predictor],
                "r": found.r[seed, unit, predictor],
                "q": found.q[seed, unit, predictor],
                "r_heldout": found.r_heldout[seed, unit, predictor],
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    @checked
    def of(self, unit: int, kind: str = NEURONS) -> pd.DataFrame:
        """The predictors that one unit follows, in how many seeds, strongest first.

        Raises:
            ArgumentError: no such kind or unit.
        """
        if kind not in self.kinds:
            raise ArgumentError(f"expected kind to be one of {list(self.kinds)}, got {kind!r}")
        found = self.kinds[kind]
        if not 0 <= unit < found.r.shape[1]:
            raise ArgumentError(f"expected a unit in 0..{found.r.shape[1] - 1}, got {unit}")
        import pandas as pd

        table = pd.DataFrame(
            {
                "predictor": self.predictors,
                "r_heldout": found.r_heldout[:, unit].mean(0),
                "seeds": found.confirmed[:, unit].sum(0),
            }
        )
        strongest: Any = table[table["seeds"] > 0]
        order = strongest["r_heldout"].abs().sort_values(ascending=False).index
        return strongest.loc[order].reset_index(drop=True)

    @staticmethod
    def _per_explained(found: Found) -> Float[np.ndarray, " seed"]:
        explained = (found.counts > 0) & found.alive
        total = (found.distinct * explained).sum(1)
        return np.where(explained.any(1), total / np.maximum(explained.sum(1), 1), np.nan)

    @staticmethod
    def _strongest(found: Found) -> Float[np.ndarray, " seed"]:
        size = np.where(found.confirmed, np.abs(found.r_heldout), 0).max(2)  # [seed, unit]
        return np.array([np.median(row[row > 0]) if (row > 0).any() else np.nan for row in size])

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {float((found.distinct * found.alive).sum() / max(found.alive.sum(), 1)):.1f}"
            for name, found in self.kinds.items()
        )
        return f"Units({self.hook}, distinct predictors per unit: {said}; {len(self.seeds)} splits)"


def _over_seeds(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and a 95 % t interval over seeds; NaN ends for one seed."""
    from scipy.stats import t

    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan"), float("nan")
    mean = float(known.mean())
    if len(known) < 2:
        return mean, float("nan"), float("nan")
    half = float(t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
    return mean, mean - half, mean + half
