"""What deletion and insertion return: curves with areas, beside random orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.results import Result
from tstlens.stats import limits_of, mean_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class DeletionInsertion(Result):
    """The measure while units are replaced by the baseline, or put back, in an order.

    Args:
        fractions: shares of a series' observed units that were replaced (or put back).
        deletion: [series, fraction], the measure with the first units of the order replaced.
        insertion: [series, fraction], the measure of the baseline with the first units put back.
        random_deletion: [order, series, fraction], the same in random orders.
        random_insertion: [order, series, fraction].
        measure: name of the measure.
        measure_unit: its unit.
        method: what made the order.
        baseline_name: what units were replaced by.
        unit: ``"patch"`` or ``"time"``.
        level: coverage of the intervals.
        made: how.
    """

    fractions: tuple[float, ...]
    deletion: Float[np.ndarray, "series fraction"]
    insertion: Float[np.ndarray, "series fraction"]
    random_deletion: Float[np.ndarray, "order series fraction"]
    random_insertion: Float[np.ndarray, "order series fraction"]
    measure: str
    measure_unit: str
    method: str
    baseline_name: str
    unit: str
    level: float = 0.95
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def deletion_area(self) -> float:
        """Mean area under the deletion curve, over shares 0 to 1; smaller is better."""
        return float(_areas(self.fractions, self.deletion).mean())

    @property
    def insertion_area(self) -> float:
        """Mean area under the insertion curve; larger is better."""
        return float(_areas(self.fractions, self.insertion).mean())

    @checked
    def intervals(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval of the mean curve at every share; NaN below 5 series.

        Args:
            kind: ``"deletion"`` or ``"insertion"``.
        """
        curves = {"deletion": self.deletion, "insertion": self.insertion}
        if kind not in curves:
            raise ArgumentError(f"expected kind as 'deletion' or 'insertion', got {kind!r}")
        return self._ends(curves[kind])

    def to_dataframe(self) -> pd.DataFrame:
        """One row for deletion, one for insertion: areas, random areas, differences, intervals.

        ``better`` is how much better than random order: random less own area for deletion, own
        less random for insertion, paired by series, with the ends of its interval.
        """
        import pandas as pd

        rows = []
        for kind, sign in (("deletion", -1.0), ("insertion", 1.0)):
            own = _areas(self.fractions, getattr(self, kind))
            random = _areas(self.fractions, getattr(self, f"random_{kind}"))
            low, high = self._ends(own[:, None])
            better = sign * (own - random.mean(0))
            better_low, better_high = self._ends(better[:, None], change=True)
            rows.append(
                {
                    "curve": kind,
                    "area": own.mean(),
                    "low": low[0],
                    "high": high[0],
                    "random_area": random.mean(),
                    "better": better.mean(),
                    "better_low": better_low[0],
                    "better_high": better_high[0],
                    "n_series": len(own),
                    "n_random": len(random),
                }
            )
        return pd.DataFrame(rows)

    def curves(self) -> pd.DataFrame:
        """One row per share: mean deletion and insertion, own and random."""
        import pandas as pd

        return pd.DataFrame(
            {
                "fraction": self.fractions,
                "deletion": self.deletion.mean(0),
                "insertion": self.insertion.mean(0),
                "random_deletion": self.random_deletion.mean((0, 1)),
                "random_insertion": self.random_insertion.mean((0, 1)),
            }
        )

    def _ends(self, values: np.ndarray, change: bool = False) -> tuple[np.ndarray, np.ndarray]:
        low, high = limits_of(self.measure_unit, self.deletion, self.insertion)
        return mean_interval(
            values,
            level=self.level,
            n_boot=self.made.get("n_boot", 2000),
            seed=self.made.get("seed", 0),
            limits=(low - high, high - low) if change else (low, high),
        )

    def __repr__(self) -> str:
        random = [
            float(_areas(self.fractions, part).mean())
            for part in (self.random_deletion, self.random_insertion)
        ]
        return (
            f"DeletionInsertion({self.method}, {self.measure}: deletion area "
            f"{self.deletion_area:.3f} (random {random[0]:.3f}), insertion area "
            f"{self.insertion_area:.3f} (random {random[1]:.3f}), {len(self.deletion)} series)"
        )


def _areas(fractions: Sequence[float], curves: np.ndarray) -> np.ndarray:
    """Area under each curve, by trapezoids."""
    return np.asarray(np.trapezoid(curves, np.asarray(fractions), axis=-1))
