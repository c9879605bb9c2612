"""What an intervention on codes did, beside the same on random codes as frequent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CodeEffects(Result):
    """A measure of the output under an intervention on codes, by number of positions.

    Args:
        values: [dose, series], with the codes that were asked about.
        controls: [control, dose, series], with random codes about as frequent.
        baseline: [series], with the codebooks in and nothing intervened on.
        doses: positions per row that were intervened on (fewer where a row has fewer).
        measure: what was measured, such as "probability of class 3".
        action: "force" or "ban".
        codes: hook point -> group -> codes.
        control_codes: the same of every control.
        frequency: share of the places at which a code is active, mean over the codes.
        control_frequency: [control], the same of every control.
        made: model, data, seed, and how codes filled up.
    """

    values: Float[np.ndarray, "dose series"]
    controls: Float[np.ndarray, "control dose series"]
    baseline: Float[np.ndarray, " series"]
    doses: tuple[int, ...]
    measure: str
    action: str
    codes: dict[str, dict[int, list[int]]]
    control_codes: tuple[dict[str, dict[int, list[int]]], ...]
    frequency: float
    control_frequency: Float[np.ndarray, " control"]
    made: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        means = zip(self.doses, self.effect().mean(1), strict=True)
        by_dose = ", ".join(f"{dose}: {change:+.3g}" for dose, change in means)
        return (
            f"CodeEffects({self.action} {self.codes}, {len(self.baseline)} series, change of the "
            f"{self.measure} by positions {{{by_dose}}}, {len(self.controls)} controls)"
        )

    def effect(self) -> Float[np.ndarray, "dose series"]:
        """Change of the measure by the intervention."""
        return self.values - self.baseline

    def control_effects(self) -> Float[np.ndarray, "control dose series"]:
        """Change of the measure by the same on every control."""
        return self.controls - self.baseline

    def summary(self) -> pd.DataFrame:
        """One row per dose: effect, controls' effect, and tests of the difference.

        Columns: ``effect`` and ``control`` are means over series (and controls); ``d`` is Cohen's
        d of the paired differences (their mean over their standard deviation; infinite where all
        are equal, as they are when every position is forced to the same); ``p_series`` is
        Wilcoxon's signed-rank test of them, two-sided: do series agree that these codes move the
        measure other than random ones? ``p_codes`` is the share of controls that move it at least
        as far in the same direction, the codes themselves counted in: are these codes special
        among codes? It cannot be below 1 / (controls + 1).
        """
        import pandas as pd

        rows = []
        for at, dose in enumerate(self.doses):
            effect, control = self.effect()[at], self.control_effects()[:, at]
            difference = effect - control.mean(0)
            differ = len(difference) > 1 and bool(np.any(difference != 0))
            sign = 1.0 if effect.mean() >= control.mean() else -1.0
            as_far = int((sign * control.mean(1) >= sign * effect.mean()).sum())
            rows.append(
                {
                    "dose": dose,
                    "effect": float(effect.mean()),
                    "control": float(control.mean()),
                    "d": _cohens_d(difference),
                    "p_series": float(stats.wilcoxon(difference)[1]) if differ else float("nan"),  # type: ignore[index]
                    "p_codes": (1 + as_far) / (1 + len(control)),
                }
            )
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per codes (control -1 is those asked about), dose and series."""
        import pandas as pd

        stacked = np.concatenate([self.values[None], self.controls])  # [control, dose, series]
        control, dose, series = np.indices(stacked.shape)
        return pd.DataFrame(
            {
                "control": control.ravel() - 1,
                "dose": np.asarray(self.doses)[dose.ravel()],
                "series": series.ravel(),
                "value": stacked.ravel(),
                "effect": (stacked - self.baseline).ravel(),
            }
        )


def _cohens_d(difference: np.ndarray) -> float:
    mean = float(difference.mean())
    if len(difference) < 2 or not np.any(difference != 0):
        return float("nan")
    spread = float(difference.std(ddof=1))
    rounding = 1e-6 * float(np.abs(difference).max())
    return mean / spread if spread > rounding else float(np.copysign(np.inf, mean))
