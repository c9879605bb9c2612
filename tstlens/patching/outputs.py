"""The patched outputs themselves, for analyses that measure one run in several ways.

``sweep`` turns every world's output into one number at once. Ablation replaces by what it makes
itself, and a campaign reads several metrics off the same worlds: both ask here.

What an ablation puts in the place of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.patching.grids import make_grids
from tstlens.patching.sites import Place, Site
from tstlens.patching.sources import (
    Observed,
    both,
    check_reference,
    mean_activations,
    observed,
    record,
    replacing,
)
from tstlens.patching.sweep import rows_that_fit
from tstlens.patching.worlds import CorruptedRun, run_worlds


@dataclass(frozen=True)
class Swept:
    """Which worlds there are: a place, its layers and the axes of the grid.

    Args:
        site: what is replaced.
        place: the site as found in the model.
        axes: what is swept, checked by :func:`tstlens.patching.grids.check_axes`.
        layers: layers that are swept, ``(None,)`` for a place outside the blocks.
        n_slices: runs of axis ``slice``.
    """

    site: Site
    place: Place
    axes: tuple[str, ...]
    layers: tuple[int | None, ...]
    n_slices: int | None = None

    @property
    def names(self) -> list[str]:
        """Hook names, one per layer."""
        return [self.place.hook_name(layer) for layer in self.layers]

    @property
    def inner(self) -> tuple[str, ...]:
        """The axes within one layer."""
        return tuple(axis for axis in self.axes if axis != "layer")

    def in_order(self, by_layer: Tensor, coords: dict[str, tuple[Any, ...]]) -> Tensor:
        """[pair, layer, world, ...] as [pair, *axes, ...]."""
        inner = self.inner
        sizes = [len(coords[axis]) for axis in inner]
        grown = by_layer.unflatten(2, sizes) if sizes else by_layer.squeeze(2)
        if "layer" not in self.axes:
            return grown.squeeze(1)
        order = ("layer", *inner)
        rest = range(1 + len(order), grown.ndim)
        return grown.permute(0, *(1 + order.index(axis) for axis in self.axes), *rest)

    def all_coords(self, coords: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """What the entries of every axis are, the layers included, in the order of the axes."""
        known = {**coords, "layer": tuple(self.layers)}
        return {axis: known[axis] for axis in self.axes}


def swept(
    model: HookedTST, site: Site, place: Place, axes: Sequence[str], n_slices: int | None
) -> Swept:
    """The worlds of a sweep over all layers, or over the site's own."""
    return Swept(site, place, tuple(axes), place.layers, n_slices)


@torch.no_grad()
def patched_outputs(
    model: HookedTST,
    run: CorruptedRun,
    what: Swept,
    given: dict[str, Tensor],
    memory_mb: float = 256.0,
    bar: tuple[Any, int] | None = None,
) -> tuple[Float[Tensor, "pair ..."], dict[str, tuple[Any, ...]]]:
    """The model's output in every world, and what the entries of the swept axes are.

    Args:
        model: the model.
        run: the corrupted run, with the activations of ``what.names``.
        what: the worlds.
        given: what replaces each named activation, [row, ...].
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        bar: a tqdm bar that is told of every run, and how many pairs there are in all; or None.

    Returns:
        Outputs [pair, *axes, ...] and coords by axis.
    """
    place = what.place
    acts = [run.acts[name] for name in what.names]
    grids, coords = make_grids(place, what.site, what.inner, acts, what.n_slices)
    per_chunk = max(1, rows_that_fit(model, run.n_pos, memory_mb) // len(run.final))
    if bar is not None and not bar[0].total:
        bar[0].reset(total=grids[0].n_worlds * len(what.names) * bar[1])
    layers = []
    for layer, name, grid in zip(what.layers, what.names, grids, strict=True):
        chunks = []
        for output in run_worlds(model, run, place, layer, grid, given[name], per_chunk):
            chunks.append(output)
            if bar is not None:
                bar[0].update(output.shape[0] * output.shape[1])
        layers.append(torch.cat(chunks).transpose(0, 1))  # [pair, world, ...]
    return what.in_order(torch.stack(layers, 1), coords), what.all_coords(coords)


AblationSource = Literal["zero", "mean", "resample"]


class Replacement:
    """Replacements for any block of the series: zero, a mean, or another series' activation.

    Args:
        model: the model.
        what: the worlds.
        source: ``"zero"``, ``"mean"`` or ``"resample"``.
        reference: series to average over or to draw from.
        reference_mask: bool [batch, time] of these, or None.
        series: the series that are ablated, [batch, channel, time].
        mask: bool [batch, time] of these, or None.
        seed: of the draw.
        contribution: whether the activation is what leaves a block, and only what the block added
            to what enters it is replaced.
    """

    def __init__(
        self,
        model: HookedTST,
        what: Swept,
        source: AblationSource,
        reference: Tensor | None,
        reference_mask: Tensor | None,
        series: Tensor,
        mask: Tensor | None,
        seed: int,
        contribution: bool,
    ) -> None:
        self.model, self.what, self.source = model, what, source
        self.contribution = contribution
        if source not in ("zero", "mean", "resample"):
            raise ArgumentError(f"source must be 'zero', 'mean' or 'resample', got {source!r}")
        if source == "zero":
            return
        if reference is None:
            raise ArgumentError(
                f"source={source!r} needs reference=: series [batch, channel, time] to "
                + ("average over" if source == "mean" else "draw from")
                + ", training data say"
            )
        self.reference = check_reference(model, reference, reference_mask, series)
        self.mask = reference_mask
        if source == "mean":
            needed = self._observed(series, mask)
            rows = (self.reference, reference_mask)
            self.means = mean_activations(
                model, what.place, what.names, rows, needed, self._recorded
            )
        else:
            self.drawn = draw_others(self.reference, series, seed, reference_mask, mask)

    def __call__(self, run: CorruptedRun, block: slice) -> dict[str, Tensor]:
        """What replaces each named activation of the run, which is that of series ``block``."""
        there: Observed = dict.fromkeys(self.what.names)
        if self.source == "resample":
            rows = self.drawn[block].to(self.reference.device)
            drawn = self.reference[rows], None if self.mask is None else self.mask[rows]
            found, there = self._recorded(*drawn), self._observed(*drawn)
        elif self.source == "mean":
            found = {}
            for name, mean in self.means.items():
                like = self.what.place.by_series(run.acts[name])
                found[name] = mean.expand(like.shape).reshape(run.acts[name].shape)
        else:
            found = {name: torch.zeros_like(run.acts[name]) for name in self.what.names}
        if self.contribution:
            for layer, name in zip(self.what.layers, self.what.names, strict=True):
                found[name] = found[name] + run.stream_before(layer or 0)
        seen = both(self._observed(run.series, run.mask), there)
        return {
            name: replacing(self.what.place, act, run.acts[name], seen[name])
            for name, act in found.items()
        }

    def _recorded(self, series: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        names, layers = self.what.names, self.what.layers
        entering = [
            f"{self.model.layer_name(layer or 0)}.hook_resid_pre" for layer in layers
        ] * self.contribution
        acts = record(self.model, series, mask, [*names, *entering])[1]
        if self.contribution:
            return {name: acts[name] - acts[pre] for name, pre in zip(names, entering, strict=True)}
        return {name: acts[name] for name in names}

    def _observed(self, series: Tensor, mask: Tensor | None) -> Observed:
        return observed(self.model, self.what.place, self.what.names, series, mask)


def draw_others(
    reference: Tensor,
    series: Tensor,
    seed: int,
    reference_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """For every series the index of a random reference series that is not that series itself.

    Series hold zeros for padding, and are the same where they also end at the same samples.

    Raises:
        ArgumentError: the reference holds nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(reference), (len(series),), generator=generator)
    held, own = (_with_mask(*rows) for rows in ((reference, reference_mask), (series, mask)))
    for _ in range(len(reference)):
        same = (held[index.to(held.device)] == own).flatten(1).all(1).cpu()
        if not bool(same.any()):
            return index
        index = torch.where(same, (index + 1) % len(reference), index)
    raise ArgumentError(
        "source='resample' found no reference series that differs from the one it is to replace; "
        "give other series as reference"
    )


def _with_mask(series: Tensor, mask: Tensor | None) -> Tensor:
    """[series, channel + 1, time]: the mask as one more channel, missing values as infinity."""
    seen = torch.ones_like(series[:, :1]) if mask is None else mask[:, None].to(series)
    return torch.cat([series.nan_to_num(torch.inf), seen], 1)
