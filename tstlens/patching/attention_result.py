"""What ``attention`` returns: patterns by head and what was counted in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AttentionResult(Result):
    """Where every head looks.

    Statistics are [series, (channel,) layer, head].

    Args:
        pattern: [series, (channel,) layer, head, query, key], NaN at padding; without the series
            axis where it was averaged.
        axes: names of the axes of ``pattern``.
        entropy: mean entropy over queries, in nats.
        relative_entropy: entropy over that of uniform attention to the keys a query sees: 0 is one
            key, 1 is uniform; queries that see a single key are left out.
        distance: mean distance between query and key, in positions.
        uniform_distance: [series], the distance that uniform attention would have.
        received: [series, (channel,) layer, head, key], mean attention that each key gets; sums
            to 1 over keys.
        uniform_received: [series, key], what each key would get from uniform attention.
        observed: bool [series, pos], False at padding.
        causal: whether queries only see what is before them.
        series: the series, [series, channel, time].
        mask: bool [series, time], or None.
        distance_samples: distance in samples, between the middles of the positions' spans; None
            where their place in time is not known.
        uniform_distance_samples: [series], the same for uniform attention.
        time_cells: first and one-past-last sample that each position stands for, or None.
        made: how: model, whether patterns were averaged.
    """

    pattern: Float[Tensor, "*kept layer head query key"]
    axes: tuple[str, ...]
    entropy: Float[Tensor, "*lead layer head"]
    relative_entropy: Float[Tensor, "*lead layer head"]
    distance: Float[Tensor, "*lead layer head"]
    uniform_distance: Float[Tensor, " series"]
    received: Float[Tensor, "*lead layer head key"]
    uniform_received: Float[Tensor, "series key"]
    observed: Bool[Tensor, "series pos"]
    causal: bool
    series: Float[Tensor, "series channel time"]
    mask: Bool[Tensor, "series time"] | None = None
    distance_samples: Float[Tensor, "*lead layer head"] | None = None
    uniform_distance_samples: Float[Tensor, " series"] | None = None
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def mean_pattern(self) -> Float[Tensor, "layer head query key"]:
        """The pattern averaged over series (and channels), each entry where it was observed."""
        lead = self.pattern.ndim - 4
        return self.pattern.flatten(0, lead - 1).nanmean(0) if lead else self.pattern

    def to_dataframe(self) -> pd.DataFrame:
        """One row per series (and channel), layer and head, with its statistics."""
        import pandas as pd

        names = ["series", *(["channel"] if self.entropy.ndim == 4 else []), "layer", "head"]
        index = pd.MultiIndex.from_product(
            [range(size) for size in self.entropy.shape], names=names
        )
        columns = {
            "entropy": self.entropy,
            "relative_entropy": self.relative_entropy,
            "distance": self.distance,
        }
        if self.distance_samples is not None:
            columns["distance_samples"] = self.distance_samples
        flat = {name: part.reshape(-1).double().cpu().numpy() for name, part in columns.items()}
        return pd.DataFrame(flat, index=index).reset_index()

    def __repr__(self) -> str:
        n_layers, n_heads = self.entropy.shape[-2:]
        mean = float(self.relative_entropy.nanmean())
        return (
            f"AttentionResult({n_layers} layers x {n_heads} heads, {len(self.series)} series; "
            f"mean entropy {mean:.0%} of uniform)"
        )
