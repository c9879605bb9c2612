"""From a grid to a result: worlds that are run and measured, for every analysis that sweeps.

``sweep``, ``ablate`` and a campaign differ in what they put in an activation's place and in how
many metrics they read; the worlds, their order and what a result says of them are told here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.grids import Slices, check_axes, make_grids
from tstlens.patching.metrics import described, joined, read_metric
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Place, Site, locate
from tstlens.patching.worlds import CorruptedRun, run_worlds

Piece = tuple[Tensor, dict[str, Tensor]]  # values [pair, *axes] and what the two runs gave
Kind = TypeVar("Kind", bound=SweepResult)


@dataclass(frozen=True)
class Swept:
    """Which worlds there are: a place, its layers and the axes of the grid.

    Args:
        site: what is replaced.
        place: the site as found in the model.
        axes: what is swept, checked by :func:`tstlens.patching.grids.check_axes`.
        layers: layers that are swept, ``(None,)`` for a place outside the blocks.
        n_slices: runs of axis ``slice``; of the series, their samples by name.
    """

    site: Site
    place: Place
    axes: tuple[str, ...]
    layers: tuple[int | None, ...]
    n_slices: Slices | None = None

    @classmethod
    def found(
        cls, model: HookedTST, site: str | Site, axes: Sequence[str], n_slices: Slices | None
    ) -> Swept:
        """The worlds of a sweep over all layers of a model, or over the site's own.

        Raises:
            UnknownSiteError, UnknownAxisError, ArgumentError: the model has no such thing.
            HookError: the site cannot fire as the model is set.
        """
        site = Site(site) if isinstance(site, str) else site
        place = locate(model, site)
        what = cls(site, place, check_axes(place, site, axes, n_slices), place.layers, n_slices)
        model.require_live(what.names)
        return what

    @property
    def site_name(self) -> str:
        """The site as results call it."""
        return repr(self.site) if self.fixed else self.site.name

    @property
    def fixed(self) -> dict[str, Any]:
        """The site where it fixes more than a name, for what results keep."""
        chosen = self.site.selections() or self.site.layer is not None
        return {"fixed": self.site} if chosen else {}

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


@torch.no_grad()
def measured(
    model: HookedTST,
    run: CorruptedRun,
    what: Swept,
    given: dict[str, Tensor],
    metrics: Sequence[Metric],
    memory_mb: float | None,
    bar: tuple[Any, int] | None = None,
) -> tuple[list[Tensor], dict[str, tuple[Any, ...]]]:
    """Every world measured, and what the entries of the swept axes are.

    Args:
        model: the model.
        run: the corrupted run, with the activations of ``what.names``.
        what: the worlds.
        given: what replaces each named activation, [row, ...].
        metrics: of the run's own pairs.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        bar: a tqdm bar that is told of every run, and how many pairs there are in all; or None.

    Returns:
        Values [pair, *axes] of every metric, and coords by axis.
    """
    place = what.place
    acts = [run.acts[name] for name in what.names]
    grids, coords = make_grids(place, what.site, what.inner, acts, what.n_slices)
    per_chunk = max(1, rows_that_fit(model, run.n_pos, memory_mb) // len(run.final))
    if bar is not None and not bar[0].total:
        bar[0].reset(total=grids[0].n_worlds * len(what.names) * bar[1])
    values: list[list[Tensor]] = [[] for _ in metrics]  # metric -> layer -> [world, pair]
    for layer, name, grid in zip(what.layers, what.names, grids, strict=True):
        chunks: list[list[Tensor]] = [[] for _ in metrics]
        for output in run_worlds(model, run, place, layer, grid, given[name], per_chunk):
            for metric, of_metric in zip(metrics, chunks, strict=True):
                of_metric.append(read_metric(metric, output))
            if bar is not None:
                bar[0].update(output.shape[0] * output.shape[1])
        for of_metric, layers in zip(chunks, values, strict=True):
            layers.append(torch.cat(of_metric))
    by_pair = (torch.stack(layers).movedim(-1, 0) for layers in values)  # [pair, layer, world]
    return [what.in_order(one, coords) for one in by_pair], what.all_coords(coords)


def assembled(
    kind: type[Kind],
    model: HookedTST,
    metric: Metric,
    coords: dict[str, tuple[Any, ...]],
    pieces: Sequence[Piece],
    n_time: int,
    *,
    site: str,
    source: str = "clean",
    place: Place | None = None,
    effects: bool = False,
    exact: bool = True,
    **made: Any,
) -> Kind:
    """The result of an analysis, from what it found for blocks of pairs.

    Args:
        kind: of result.
        model: the model.
        metric: what was measured.
        coords: the axes beside the pairs, and what their entries are.
        pieces: of each block.
        n_time: samples of a series.
        site: what was replaced, in words.
        source: what replaced it.
        place: whose positions the axis ``pos`` counts.
        effects: whether pieces hold effects in place of values.
        exact: whether they are differences of runs, which have a rounding; a gradient's estimate
            is as exact as its own size.
        **made: how.
    """
    found = torch.cat([piece[0] for piece in pieces])
    runs: dict[str, Any] = joined([piece[1] for piece in pieces])
    if not exact:
        del runs["rounding"]
    if effects:
        runs["effects"] = found
        found = runs["baseline"].view(-1, *(1,) * (found.ndim - 1)) + found
    return kind(
        values=found,
        axes=("pair", *coords),
        coords={"pair": tuple(range(len(found))), **coords},
        **runs,
        **described(metric),
        site=site,
        source=source,
        time_cells=time_cells(model, n_time, place),
        positions_are=model.cfg.positions_are,
        n_pairs=len(found),
        made={"model": model.cfg.model_name, **made},
    )


def rows_that_fit(model: HookedTST, n_pos: int, memory_mb: float | None) -> int:
    """Rows of the trunk whose activations in one block take about ``memory_mb`` MiB."""
    cfg = model.cfg
    fewest = 1
    if memory_mb is None:
        on_cpu = torch.device(cfg.device).type == "cpu"
        memory_mb, fewest = (8.0, 16) if on_cpu else (1024.0, 1)
    per_pos = 8 * cfg.d_model + 2 * cfg.d_mlp + cfg.n_heads * n_pos
    return max(fewest, int(memory_mb * 2**20 / (4 * n_pos * per_pos)))


def time_cells(
    model: HookedTST, n_time: int, place: Place | None = None
) -> tuple[tuple[int, int], ...] | None:
    """First and one-past-last sample of every position; None where they are not known.

    Args:
        model: the model.
        n_time: samples of a series.
        place: whose positions; those of a decoder stand for no samples.
    """
    if place is not None and place.in_decoder:
        return None
    n_pos = model.n_pos(n_time)
    if n_pos is None or model.cfg.positions_are == "channel":
        return None
    cells = [model.time_cell(pos, n_time) for pos in range(n_pos)]
    return tuple((cell.start, cell.stop) for cell in cells)
