"""What attribution is shared out over: channel x patch, or channel x sample."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.errors import ArgumentError
from tstlens.model import HookedTST

Unit = Literal["patch", "time"]
UNITS = ("patch", "time")
AXIS = {"patch": "pos", "time": "time"}  # unit -> name of the last axis of a result

Cells = tuple[tuple[int, int], ...]


def cells_of(model: HookedTST, n_time: int, unit: Unit) -> Cells:
    """(first, one past last) sample of every unit; they never overlap.

    Patches are the time cells of the model's positions: the samples nearest to each. Where patches
    overlap, each keeps its samples up to the start of the next one, so that no sample counts twice.
    A position that is left without samples has an empty cell; samples that the front end drops
    belong to no cell.

    Raises:
        ArgumentError: another unit, or positions that have no known place in time.
    """
    if unit not in UNITS:
        raise ArgumentError(f"expected unit as one of {', '.join(UNITS)}, got {unit!r}")
    if unit == "time":
        return tuple((sample, sample + 1) for sample in range(n_time))
    n_pos = model.n_pos(n_time)
    if n_pos is None:
        raise ArgumentError(
            "this model's positions have no known place in time: its front end is your own "
            "module; use unit='time'"
        )
    if model.cfg.positions_are == "channel":
        raise ArgumentError(
            "this model's positions are channels, each embedded from its whole series, so they "
            "have no place in time; use unit='time'"
        )
    spans = [model.time_cell(pos, n_time) for pos in range(n_pos)]
    starts = [span.start for span in spans] + [n_time]
    return tuple(
        (span.start, max(span.start, min(span.stop, following)))
        for span, following in zip(spans, starts[1:], strict=True)
    )


def unit_of_sample(cells: Cells, n_time: int) -> Int[Tensor, " time"]:
    """The unit that each sample belongs to; ``len(cells)`` for samples of none."""
    owner = torch.full((n_time,), len(cells), dtype=torch.int64)
    for number, (start, stop) in enumerate(cells):
        owner[start:stop] = number
    return owner


def feature_mask(cells: Cells, n_channels: int, n_time: int) -> Int[Tensor, "1 channel time"]:
    """captum's feature mask: one number per channel and unit, channel-major.

    Samples of no unit share one last number; the model does not read them.
    """
    owner = unit_of_sample(cells, n_time)
    channel = torch.arange(n_channels)[:, None]
    mask = channel * len(cells) + owner[None]
    return torch.where(owner[None] == len(cells), n_channels * len(cells), mask)[None]


def summed(
    values: Float[Tensor, "batch channel time"], cells: Cells
) -> Float[Tensor, "batch channel unit"]:
    """Values added up over the samples of every unit."""
    owner = unit_of_sample(cells, values.shape[2]).to(values.device)
    total = values.new_zeros(*values.shape[:2], len(cells) + 1)
    return total.index_add_(2, owner, values)[:, :, : len(cells)]


def seen_units(
    mask: Bool[Tensor, "batch time"] | None, cells: Cells, series: Float[Tensor, "batch _ time"]
) -> Bool[Tensor, "batch channel unit"]:
    """Units with at least one sample that is neither padding nor missing."""
    seen = ~series.isnan() if mask is None else ~series.isnan() & mask[:, None].to(series.device)
    return summed(seen.double().cpu(), cells) > 0


def spread(
    chosen: Bool[Tensor, "batch channel unit"], cells: Cells, n_time: int
) -> Bool[Tensor, "batch channel time"]:
    """Whether each sample's unit is chosen; samples of no unit are not."""
    owner = unit_of_sample(cells, n_time).to(chosen.device)
    none = chosen.new_zeros(*chosen.shape[:2], 1)
    return torch.cat([chosen, none], 2)[:, :, owner]
