"""Outputs with more or less of one latent, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.errors import ArgumentError
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class LatentEffect(Result):
    """Outputs of a model with more or less of one latent.

    Args:
        kind: ``"ablation"`` or ``"steering"``.
        latent: which latent.
        doses: share of the latent's activation removed (ablation), or multiples of ``unit`` added
            at every position (steering).
        output: [dose, series, ...] logits [class] or forecasts [channel, horizon].
        baseline: [series, ...] without the edit.
        controls: [control, dose, series, ...] the same with other latents.
        control_latents: which those were.
        series: indices of the series in the data.
        outputs: class names, or steps of the forecast.
        task: ``"class"`` or ``"forecast"``.
        labels: class index per series, or None.
        unit: activation that one unit of steering adds; 1 for ablation (a share).
        hook: where the latent lives.
        made: how.
    """

    kind: str
    latent: int
    doses: tuple[float, ...]
    output: Float[Tensor, "dose series *out"]
    baseline: Tensor
    controls: Float[Tensor, "control dose series *out"]
    control_latents: tuple[int, ...]
    series: Int[Tensor, " series"]
    outputs: tuple[str, ...]
    task: str
    labels: Int[Tensor, " series"] | None
    unit: float
    hook: str
    made: dict[str, Any] = field(default_factory=dict)

    def change(self, measure: str | None = None) -> Float[Tensor, " dose series out"]:
        """Change per dose, series and class (or step of the forecast, mean over channels).

        Args:
            measure: ``"probability"`` (the default for classifiers) or ``"logit"``; ``"forecast"``
                for forecasters.

        Raises:
            ArgumentError: another measure.
        """
        return self._measured(self.output, measure) - self._measured(self.baseline, measure)

    def control_change(
        self, measure: str | None = None
    ) -> Float[Tensor, "control dose series out"]:
        """The same for the control latents."""
        return self._measured(self.controls, measure) - self._measured(self.baseline, measure)

    def _measured(self, output: Tensor, measure: str | None) -> Tensor:
        known = ("forecast",) if self.task == "forecast" else ("probability", "logit")
        measure = known[0] if measure is None else measure
        if measure not in known:
            raise ArgumentError(f"expected a measure of {list(known)}, got {measure!r}")
        if measure == "forecast":
            return output.double().mean(-2)
        return output.double().softmax(-1) if measure == "probability" else output.double()

    def to_dataframe(self, measure: str | None = None) -> pd.DataFrame:
        """One row per dose and class (or forecast step).

        ``change`` is the mean over series with a 95 % t interval (``low``, ``high``);
        ``control`` the mean over the control latents of their mean change, ``control_low`` and
        ``control_high`` the least and greatest of these, and ``beyond_controls`` the share of
        control latents with a smaller mean change in size.
        """
        import pandas as pd
        from scipy.stats import t

        change, control = self.change(measure), self.control_change(measure).mean(2)
        n = change.shape[1]
        mean = change.mean(1)
        error = change.std(1) / n**0.5 if n > 1 else torch.full_like(mean, torch.nan)
        half = error * float(t.ppf(0.975, max(n - 1, 1)))
        smaller = (control.abs() < mean.abs()).double().mean(0)
        index = pd.MultiIndex.from_product(
            [self.doses, self.outputs],
            names=["dose", "class" if self.task == "class" else "step"],
        )
        columns = {
            "change": mean,
            "low": mean - half,
            "high": mean + half,
            "control": control.mean(0),
            "control_low": control.amin(0),
            "control_high": control.amax(0),
            "beyond_controls": smaller,
        }
        frame = pd.DataFrame({k: v.flatten().numpy() for k, v in columns.items()}, index=index)
        return frame.reset_index()

    def __repr__(self) -> str:
        size = self.change().mean(1).abs().amax(1)
        shown = ", ".join(f"{d:g}: {float(s):.3g}" for d, s in zip(self.doses, size, strict=True))
        return (
            f"LatentEffect({self.kind} of latent {self.latent} at {self.hook}, "
            f"{len(self.series)} series, largest mean change by dose {{{shown}}})"
        )
