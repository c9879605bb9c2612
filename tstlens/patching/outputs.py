"""The patched outputs themselves, for analyses that measure one run in several ways.

``sweep`` turns every world's output into one number at once. Ablation replaces by what it makes
itself, and a campaign reads several metrics off the same worlds: both ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.model import HookedTST
from tstlens.patching.grids import make_grids
from tstlens.patching.sites import Place, Site
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
