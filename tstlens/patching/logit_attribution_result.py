"""What a logit attribution returns: contributions with named axes, which sum to the output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import UnknownAxisError
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["embed", "pos_embed", "head", "attn_bias", "second_attn", "mlp", "norm_bias"]
_REST = "head bias"  # what the output holds without any position


@dataclass(frozen=True)
class Component:
    """Something that writes to the residual stream.

    Args:
        name: what tables and figures call it.
        kind: what it is.
        layer: its block, where it lies in one.
        head: its head.
    """

    name: str
    kind: Kind
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class LogitAttribution(Result):
    """How much of an output each component wrote at each position.

    Args:
        values: [series, (channel,) component, pos], in ``unit``.
        axes: names of the axes of ``values``.
        coords: for every axis what its entries are.
        components: what writes, in the order of the axis.
        constant: [series], the head's bias, which has no position.
        output: [series], what the model gives; the sum of the above.
        target: which output.
        unit: ``"logit"`` or ``"units of the forecast"``.
        pooling: how the head pools.
        weight: [series, (channel,) pos], share of the pooled vector taken from each position.
        winner: [series, (channel,) d_model], the position that each dimension was taken from under
            max pooling; None for other poolings.
        time_cells: first and one-past-last sample that each position stands for, or None.
        error: largest gap between the sum and the output, in ``unit``.
        made: how: model, method.
    """

    values: Float[Tensor, "*axes"]
    axes: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    components: tuple[Component, ...]
    constant: Float[Tensor, "*series"]
    output: Float[Tensor, "*series"]
    target: str
    unit: str
    pooling: str
    weight: Float[Tensor, "*where"]
    winner: Int[Tensor, "*which"] | None = None
    time_cells: tuple[tuple[int, int], ...] | None = None
    error: float = 0.0
    made: dict[str, Any] = field(default_factory=dict)

    def total(self) -> Float[Tensor, "*series"]:
        """The sum of everything, the head's bias included: the output, up to rounding."""
        axes = [at for at, axis in enumerate(self.axes) if axis != "series"]
        return self.values.sum(axes) + self.constant

    def by_component(self) -> Float[Tensor, "*series component"]:
        """Summed over positions (and channels)."""
        return self._summed_to("component")

    def by_pos(self) -> Float[Tensor, "*series pos"]:
        """Summed over components (and channels): ``figures.series(x, effect=...by_pos()[0])``."""
        return self._summed_to("pos")

    def _summed_to(self, axis: str) -> Tensor:
        if axis not in self.axes:
            raise UnknownAxisError(axis, self.axes, "This result has these")
        gone = [at for at, name in enumerate(self.axes) if name not in ("series", axis)]
        return self.values.sum(gone) if gone else self.values

    def mean(self) -> LogitAttribution:
        """The result averaged over series (winners are dropped, weights averaged)."""
        if "series" not in self.axes:
            raise UnknownAxisError("series", self.axes, "This result was averaged before")
        return replace(
            self,
            values=self.values.mean(0),
            axes=self.axes[1:],
            coords={axis: self.coords[axis] for axis in self.axes[1:]},
            constant=self.constant.mean(),
            output=self.output.mean(),
            weight=self.weight.mean(0),
            winner=None,
            made={**self.made, "n_series": len(self.values)},
        )

    @checked
    def top(self, n: int = 5) -> pd.DataFrame:
        """The ``n`` components with the largest mean contribution in size, strongest first."""
        import pandas as pd

        result = self.mean() if "series" in self.axes else self
        by_component = result.by_component()
        order = by_component.abs().argsort(descending=True, stable=True)[:n].tolist()
        rows = [
            {"component": str(self.components[at]), "contribution": float(by_component[at])}
            for at in order
        ]
        return pd.DataFrame(rows, columns=["component", "contribution"])

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: a column per axis, then kind, layer, head and contribution.

        The head's bias is a component without a position, so contributions of a series sum to its
        output.
        """
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.coords[axis] for axis in self.axes], names=list(self.axes)
        )
        flat = self.values.reshape(-1).double().cpu().numpy()
        frame = pd.DataFrame({"contribution": flat}, index=index).reset_index()
        parts = {str(part): part for part in self.components}
        for name in ("kind", "layer", "head"):
            frame[name] = frame["component"].map({k: getattr(p, name) for k, p in parts.items()})
        rest = pd.DataFrame({"contribution": self.constant.reshape(-1).double().cpu().numpy()})
        if "series" in self.axes:
            rest["series"] = list(self.coords["series"])
        rest["component"], rest["kind"] = _REST, "head_bias"
        frame = pd.concat([frame, rest], ignore_index=True)
        whole = [name for name in ("channel", "layer", "head", "pos") if name in frame]
        frame = frame.astype({name: "Int64" for name in whole})
        return frame[[*self.axes, "kind", "layer", "head", "contribution"]]

    def __repr__(self) -> str:
        shape = ", ".join(
            f"{axis}={size}" for axis, size in zip(self.axes, self.values.shape, strict=True)
        )
        return (
            f"LogitAttribution({self.target} [{shape}], mean {float(self.output.mean()):.4g} "
            f"{self.unit}, largest gap of the sum {self.error:.1e})"
        )
