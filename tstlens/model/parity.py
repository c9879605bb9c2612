"""The parity report: how far a converted model's output is from its source's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from tstlens.errors import ArgumentError


@dataclass(frozen=True)
class Parity:
    """What the check at conversion measured.

    Args:
        max_abs: absolute difference of the outputs in float32, on the input that came nearest to
            its limit (or farthest beyond).
        max_rel: the same divided by the largest absolute output of the source.
        tolerance: what ``max_rel`` had to stay under: 1e-5, or 4 times ``source_rounding`` where
            that is more.
        max_abs_float64: as ``max_abs``, both models in float64; None where the model is too large
            to hold copies of it in float64.
        max_rel_float64: as ``max_rel``, both models in float64.
        tolerance_float64: what ``max_rel_float64`` had to stay under.
        inputs: what was compared, in words: shapes, masks, constant series.
        source: the source's class, or the family its weights were rebuilt into.
        source_rounding: how far the source's own output in float32 is from its output in float64,
            on the same input and scale; None where float64 was not run.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    max_abs_float64: float | None
    max_rel_float64: float | None
    tolerance_float64: float
    inputs: tuple[str, ...]
    source: str
    source_rounding: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every difference that was measured is within its tolerance."""
        single, double = self.max_rel, self.max_rel_float64
        return single <= self.tolerance and (double is None or double <= self.tolerance_float64)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Parity:
        """Read back :meth:`to_dict`'s dictionary."""
        names = {entry.name for entry in fields(cls)}
        given = set(values) | {"source_rounding"} if isinstance(values, dict) else set()
        if given != names:
            raise ArgumentError(f"expected the entries {', '.join(sorted(names))}, got {values!r}")
        return cls(**{**values, "inputs": tuple(values["inputs"])})

    def __str__(self) -> str:
        verdict = "equal within tolerance" if self.passed else "DIFFERENT"
        double = "float64 was not run"
        if self.max_rel_float64 is not None:
            double = f"float64 {self.max_rel_float64:.1e} (limit {self.tolerance_float64:.0e})"
        own = ""
        if self.source_rounding is not None:
            own = f", the source's own rounding {self.source_rounding:.1e}"
        return (
            f"{verdict} to {self.source}: float32 {self.max_rel:.1e} of the output's scale "
            f"(limit {self.tolerance:.1g}, absolute {self.max_abs:.1e}{own}), {double}; "
            f"inputs: {'; '.join(self.inputs)}"
        )
