"""What an attribution returns: a share of the output for every channel and unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.probing.attribution.units import AXIS, Cells, Unit, unit_of_sample
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.probing.attribution.agreement import AttributionAgreement


@dataclass(frozen=True, repr=False)
class InputAttribution(Result):
    """Attribution of a measure to channel x patch or channel x sample, series by series.

    Args:
        values: [batch, channel, pos] or [batch, channel, time], in the measure's unit: what each
            unit adds on the way from the baseline to the series. NaN where a unit is padding.
        unit: ``"patch"`` or ``"time"``.
        cells: (first, one past last) sample of every unit.
        series: [batch, channel, time], as given.
        baseline: [batch, channel, time], what they were compared with; [sample, channel, time]
            where every series was compared with a set.
        baseline_name: in words.
        output: [batch], the measure of the series.
        baseline_output: [batch], the measure of the baseline (the mean over a set).
        target: [batch] classes, or None.
        method: which.
        measure: name of the measure.
        measure_unit: its unit.
        mask: [batch, time], False where padded; None where everything was observed.
        made: how: options of the method and its seed.
    """

    values: Float[Tensor, "batch channel unit"]
    unit: Unit
    cells: Cells
    series: Float[Tensor, "batch channel time"]
    baseline: Float[Tensor, "other channel time"]
    baseline_name: str
    output: Float[Tensor, " batch"]
    baseline_output: Float[Tensor, " batch"]
    target: Int[Tensor, " batch"] | None
    method: str
    measure: str
    measure_unit: str
    mask: Bool[Tensor, "batch time"] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, str, str]:
        """Names of the axes of ``values``."""
        return ("batch", "channel", AXIS[self.unit])

    @property
    def residual(self) -> Float[Tensor, " batch"]:
        """Sum of the attributions less the difference of the outputs; 0 where they are complete.

        Integrated gradients, GradientSHAP and Shapley values should add up to the difference;
        occlusion need not. A large residual of integrated gradients asks for more ``n_steps``.
        """
        return self.values.nansum((1, 2)) - (self.output - self.baseline_output)

    @property
    def completeness(self) -> Float[Tensor, " batch"]:
        """Size of the residual over that of the difference of outputs; NaN without a difference."""
        gap = (self.output - self.baseline_output).abs()
        return torch.where(gap > 1e-6, self.residual.abs() / gap, torch.nan)

    def per_sample(self) -> Float[Tensor, "batch channel time"]:
        """Every sample's unit's value, [batch, channel, time]; NaN for samples of no unit."""
        owner = unit_of_sample(self.cells, self.series.shape[2])
        none = self.values.new_full((*self.values.shape[:2], 1), torch.nan)
        return torch.cat([self.values, none], 2)[:, :, owner]

    @checked
    def agreement(self, sweep: Any, **options: Any) -> AttributionAgreement:
        """Rank agreement with causal patching of the same inputs; see ``attribution.agreement``.

        Args:
            sweep: a :class:`tstlens.patching.SweepResult` of the same series.
            **options: ``absolute``, ``level``, ``n_boot``, ``seed``.
        """
        from tstlens.probing.attribution.agreement import agreement

        return agreement(self, sweep, **options)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per series, channel and unit: first and last sample, attribution."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [range(size) for size in self.values.shape], names=list(self.axes)
        )
        n = self.values.shape[0] * self.values.shape[1]
        return pd.DataFrame(
            {
                "start": [cell[0] for cell in self.cells] * n,
                "stop": [cell[1] for cell in self.cells] * n,
                "attribution": self.values.reshape(-1).numpy(),
            },
            index=index,
        ).reset_index()

    @checked
    def one(self, index: int) -> InputAttribution:
        """The attribution of one series, with its batch axis."""
        n = len(self.values)
        if not -n <= index < n:
            raise ArgumentError(f"expected a series in 0..{n - 1}, got {index}")
        at = slice(index % n, index % n + 1)
        own = len(self.baseline) == n and self.made.get("baseline") != "samples"
        return InputAttribution(
            self.values[at],
            self.unit,
            self.cells,
            self.series[at],
            self.baseline[at] if own else self.baseline,
            self.baseline_name,
            self.output[at],
            self.baseline_output[at],
            None if self.target is None else self.target[at],
            self.method,
            self.measure,
            self.measure_unit,
            None if self.mask is None else self.mask[at],
            self.made,
        )

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name}={size}" for name, size in zip(self.axes, self.values.shape, strict=True)
        )
        median = float(self.completeness.nanmedian())
        return (
            f"InputAttribution({self.method} [{sizes}], {self.measure}, against "
            f"{self.baseline_name}; residual {median:.1%} of the difference)"
        )
