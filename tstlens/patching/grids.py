"""Grids: the axes of a sweep as one bool mask per world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tstlens.errors import ArgumentError, UnknownAxisError
from tstlens.patching.sites import AXIS_ALIASES, Place, Site, axis_of, chosen


@dataclass(frozen=True)
class Grid:
    """The worlds of one layer: which entries of the activation each one replaces.

    Args:
        masks: for each axis of the place a bool mask [world or 1, size of the axis].
        n_worlds: how many there are.
        pos: the one position that each world replaces, int [world]; None where a world replaces
            several.
    """

    masks: tuple[Tensor, ...]
    n_worlds: int
    pos: Tensor | None

    def condition(self, worlds: slice, skip_pos: int | None = None) -> Tensor:
        """bool [world, 1 (pair), *axes], True where the world replaces; 1 along axis skip_pos."""
        n_axes = len(self.masks)
        condition = torch.ones(1, 1, *(1,) * n_axes, dtype=torch.bool, device=self.masks[0].device)
        for number, mask in enumerate(self.masks):
            if number == skip_pos:
                continue
            mask = mask[worlds] if len(mask) > 1 else mask
            shape = [len(mask), 1] + [1] * n_axes
            shape[2 + number] = mask.shape[1]
            condition = condition & mask.view(shape)
        return condition


Slices = int | Mapping[str, tuple[int, int]]  # how many runs of features; samples by name


def check_axes(
    place: Place, site: Site, axes: Sequence[str], n_slices: Slices | None
) -> tuple[str, ...]:
    """The axes of a sweep under their own names.

    Raises:
        UnknownAxisError: the site has no such axis.
        ArgumentError: an axis twice, no layer, or slices that do not fit.
    """
    if isinstance(axes, str):
        raise ArgumentError(f"axes must be a sequence of names, try axes=({axes!r},)")
    known = [*(["layer"] if place.layered else []), *place.axes]
    if "feature" in place.axes or "time" in place.axes:
        known.append("slice")
    own = [axis if axis in ("layer", "slice") else axis_of(place, axis) for axis in axes]
    for axis, name in zip(axes, own, strict=True):
        if name not in known:
            advice = f"Site {site.name!r} of this model has these"
            if axis == "channel":
                advice += "; its trunk mixes channels: sweep site 'series' for the input's channels"
            raise UnknownAxisError(axis, known, advice)
    targets = [axis_of(place, name) for name in own]
    if len(set(targets)) != len(targets):
        raise ArgumentError(f"an axis is swept once, got axes={tuple(axes)}")
    if place.layered and "layer" not in axes:
        raise ArgumentError(
            f"site {site.name!r} is in every layer: sweep 'layer' too, or choose one with "
            f"Site({site.name!r}, layer=0)"
        )
    if n_slices is not None and "slice" not in axes:
        raise ArgumentError("n_slices was given, but 'slice' is not among the axes")
    return tuple(AXIS_ALIASES.get(axis, axis) for axis in axes)


def make_grid(
    place: Place,
    site: Site,
    axes: tuple[str, ...],
    sizes: Sequence[int],
    n_slices: Slices | None,
    device: torch.device,
) -> tuple[Grid, dict[str, tuple[Any, ...]]]:
    """The worlds of one layer in the order of ``axes``, and what each axis' entries are."""
    own = {axis_of(place, axis): index for axis, index in site.selections().items()}
    size_of = dict(zip(place.axes, sizes, strict=True))
    fixed = {axis: chosen(own.get(axis), size, axis) for axis, size in size_of.items()}
    rows: dict[str, Tensor] = {}  # swept axis -> [entry, size]
    coords: dict[str, tuple[Any, ...]] = {}
    for axis in axes:
        target = axis_of(place, axis)
        size = size_of[target]
        if axis == "slice":
            rows[target] = _slices(size, n_slices, place) & fixed[target]
            named = n_slices if isinstance(n_slices, Mapping) else range(len(rows[target]))
            coords[axis] = tuple(named)
        else:
            entries = fixed[target].nonzero().flatten()
            rows[target] = torch.nn.functional.one_hot(entries, size).bool()
            coords[axis] = tuple(entries.tolist())
    counts = [len(coords[axis]) for axis in axes]
    n_worlds = prod(counts)
    index = torch.arange(n_worlds)
    masks, pos = [], None
    for target in place.axes:
        swept = [axis for axis in axes if axis_of(place, axis) == target]
        if not swept:
            masks.append(fixed[target][None].to(device))
            continue
        after = prod(counts[axes.index(swept[0]) + 1 :])
        entry = index // after % len(coords[swept[0]])
        masks.append(rows[target][entry].to(device))
        if target == "pos":
            pos = torch.tensor(coords[swept[0]])[entry].to(device)
    return Grid(tuple(masks), n_worlds, pos), coords


def make_grids(
    place: Place,
    site: Site,
    axes: tuple[str, ...],
    acts: Sequence[Tensor],
    n_slices: Slices | None,
) -> tuple[list[Grid], dict[str, tuple[Any, ...]]]:
    """The worlds of every layer, from one activation of each, and what each axis' entries are.

    Layers of an encoder and a decoder differ in their positions; an axis that is swept has to be
    the same in all of them.

    Raises:
        ArgumentError: it is not.
    """
    grids: list[Grid] = []
    first: dict[str, tuple[Any, ...]] = {}
    for act in acts:
        sizes = place.by_series(act).shape[1:]
        grid, coords = make_grid(place, site, axes, sizes, n_slices, act.device)
        for axis, entries in coords.items():
            if entries != first.get(axis, entries):
                raise ArgumentError(
                    f"the layers of site {site.name!r} differ along axis {axis!r}: "
                    f"{len(first[axis])} entries in one, {len(entries)} in another; sweep encoder "
                    f"and decoder apart, as 'encoder_{site.name}' and 'decoder_{site.name}'"
                )
        grids.append(grid)
        first = coords
    return grids, first


def grid_of_rows(
    place: Place, sizes: dict[str, int], entries: dict[str, Tensor], device: torch.device
) -> Grid:
    """The worlds of one layer from explicit rows: ``entries[axis]`` is the index in each world.

    Raises:
        ArgumentError: an index lies outside its axis.
    """
    n_worlds = len(next(iter(entries.values()))) if entries else 1
    masks = []
    for axis in place.axes:
        if axis not in entries:
            masks.append(torch.ones(1, sizes[axis], dtype=torch.bool, device=device))
            continue
        index = entries[axis]
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < sizes[axis]:
            raise ArgumentError(
                f"expected {axis} in 0..{sizes[axis] - 1}, got {int(index.min())} to "
                f"{int(index.max())}"
            )
        masks.append(torch.nn.functional.one_hot(index, sizes[axis]).bool().to(device))
    pos = entries.get("pos")
    return Grid(tuple(masks), n_worlds, None if pos is None else pos.to(device))


def _slices(size: int, n_slices: Slices | None, place: Place) -> Tensor:
    if isinstance(n_slices, Mapping):
        at = torch.arange(size)
        spans = torch.tensor(list(n_slices.values()))
        return (at >= spans[:, :1]) & (at < spans[:, 1:])
    if "time" in place.axes:
        raise ArgumentError("axis 'slice' of the series needs slices=: samples of each, or spans")
    if n_slices is None or n_slices < 1 or size % n_slices:
        raise ArgumentError(
            f"axis 'slice' needs n_slices that divides the last axis of {place.template} "
            f"({size}), got n_slices={n_slices}"
        )
    return torch.eye(n_slices, dtype=torch.bool).repeat_interleave(size // n_slices, 1)
