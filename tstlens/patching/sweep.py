"""Exact activation patching: replace one thing at a time, and see what the output does.

Run the corrupted series, but let one activation be what it was for the clean series. If the metric
moves towards the clean run's, the activation carries what the two series differ in. Sweeping over
layers, heads and positions gives a map of what matters.

What can mislead: a site that restores the output need not be the only one (backup); a site that
carries a difference which two others cancel looks strong alone; effects do not add up; and clean
activations inside a corrupted run are combinations that no real series may produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Positive, checked
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.grids import check_axes, make_grids
from tstlens.patching.metrics import (
    MeasureOutput,
    as_metric,
    described,
    joined,
    pair_blocks,
    read_metric,
    read_runs,
)
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Place, Site, locate
from tstlens.patching.sources import Reference, ReferenceMask, Source, record, sources
from tstlens.patching.worlds import run_corrupted, run_worlds
from tstlens.shapes import PairMask, PairSeries


@checked
@torch.no_grad()
def sweep(
    model: HookedTST,
    clean: PairSeries,
    corrupted: PairSeries,
    site: str | Site,
    axes: Sequence[str],
    metric: MeasureOutput,
    source: Source | Tensor = "clean",
    *,
    n_slices: int | None = None,
    reference: Reference | None = None,
    reference_mask: ReferenceMask | None = None,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    memory_mb: Positive | None = None,
    progress: bool = True,
) -> SweepResult:
    """Replace a site at every point of a grid, one at a time, in the corrupted run.

    Args:
        model: the model.
        clean: series [pair, channel, time] (one pair may come without the pair axis).
        corrupted: series of the same shape.
        site: what is replaced: ``"z"``, ``"resid_post"``, ``"mlp_out"``, ``"pattern"`` …, a full
            hook name, or a :class:`Site` that fixes some axes. See :mod:`tstlens.patching.sites`.
        axes: what is swept, in the order wanted: ``"layer"``, ``"head"``, ``"pos"``,
            ``"channel"``, ``"query"``, ``"key"``, ``"feature"``, ``"slice"`` …; axes that are not
            named are replaced whole. What is padding (or missing) in either series is never
            replaced, and its effect is 0; rows of a pattern then need not add up to 1.
        metric: :func:`~tstlens.patching.log_prob` and its like, or any function from outputs
            [pair, ...] to [pair].
        source: what replaces: ``"clean"`` (the clean run), ``"zero"``, ``"mean"`` (over
            ``reference``, per position) or other series [pair, channel, time], under
            ``clean_mask``.
        n_slices: runs that axis ``"slice"`` cuts the last axis into.
        reference: series [batch, channel, time] for ``source="mean"``.
        reference_mask: bool [batch, time] of these; padding and missing values stay out of means.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.
        memory_mb: worlds run in chunks whose activations stay near this many MiB; where None 8 on
            a CPU (chunks that stay in its cache are fastest) and 1024 on a GPU.
        progress: show a progress bar.

    Returns:
        Values [pair, *axes] with baseline, clean value, effect, frame and figure.

    Raises:
        UnknownSiteError, UnknownHookError, UnknownAxisError: the model has no such thing.
        SeriesShapeError: clean and corrupted differ in shape, or do not fit the model.
        ArgumentError: an option that is missing or impossible; the message names it.

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> result = patching.sweep(model, a, b, "z", ("layer", "head"),
        ...                         patching.log_prob(torch.zeros(6, dtype=torch.long)))
        >>> result.effect().shape
        torch.Size([6, 2, 4])
    """
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    site = Site(site) if isinstance(site, str) else site
    place = locate(model, site)
    axes = check_axes(place, site, axes, n_slices)
    means = (reference, reference_mask)
    plan = _Plan(site, place, place.layers, axes, n_slices, source, means, memory_mb)
    model.require_live(plan.names)
    metric = as_metric(metric, len(clean))
    pieces, coords = [], {}
    with tqdm(total=0, desc=f"patching {site.name}", unit="run", disable=not progress) as bar:
        for block in pair_blocks(len(clean), metric):
            piece, coords = _sweep_block(
                model,
                plan.of_pairs(block),
                metric.of_pairs(block),
                (clean[block], None if clean_mask is None else clean_mask[block]),
                (corrupted[block], None if corrupted_mask is None else corrupted_mask[block]),
                (bar, len(clean)),
            )
            pieces.append(piece)
    values, runs = zip(*pieces, strict=True)
    return SweepResult(
        values=torch.cat(values),
        axes=("pair", *axes),
        coords={"pair": tuple(range(len(clean))), **coords},
        **joined(list(runs)),
        **described(metric),
        site=repr(site) if site.selections() or site.layer is not None else site.name,
        source=source if isinstance(source, str) else "other series",
        time_cells=time_cells(model, clean.shape[2], place),
        positions_are=model.cfg.positions_are,
        n_pairs=len(clean),
        made={"model": model.cfg.model_name, "method": "exact", "n_slices": n_slices},
    )


@dataclass(frozen=True)
class _Plan:
    """What a sweep replaces, and by what."""

    site: Site
    place: Place
    layers: tuple[int | None, ...]
    axes: tuple[str, ...]
    n_slices: int | None
    source: Source | Tensor
    reference: tuple[Tensor | None, Tensor | None]
    memory_mb: float | None

    @property
    def names(self) -> list[str]:
        """Hook names, one per layer."""
        return [self.place.hook_name(layer) for layer in self.layers]

    def of_pairs(self, block: slice) -> _Plan:
        """The plan for some of the pairs."""
        if not isinstance(self.source, Tensor):
            return self
        return replace(self, source=self.source[block])


def _sweep_block(
    model: HookedTST,
    plan: _Plan,
    metric: Metric,
    clean: tuple[Tensor, Tensor | None],
    corrupted: tuple[Tensor, Tensor | None],
    bar: tuple[Any, int],
) -> tuple[tuple[Tensor, dict[str, Tensor]], dict[str, tuple[Any, ...]]]:
    """Values [pair, *axes] and what the two runs give, of some of the pairs."""
    place, names = plan.place, plan.names
    clean_output, clean_acts = record(model, *clean, names)
    run = run_corrupted(model, *corrupted, place, plan.layers)
    given = sources(model, place, names, plan.source, clean, clean_acts, run, *plan.reference)
    inner = tuple(axis for axis in plan.axes if axis != "layer")
    acts = [run.acts[name] for name in names]
    grids, coords = make_grids(place, plan.site, inner, acts, plan.n_slices)
    if bar[0].total == 0:
        bar[0].reset(total=grids[0].n_worlds * len(names) * bar[1])
    rows = rows_that_fit(model, run.n_pos, plan.memory_mb)
    worlds_per_chunk = max(1, rows // len(run.final))
    values = []  # layer -> [world, pair]
    for layer, name, grid in zip(plan.layers, names, grids, strict=True):
        chunks = []
        for output in run_worlds(model, run, place, layer, grid, given[name], worlds_per_chunk):
            chunks.append(read_metric(metric, output))
            bar[0].update(chunks[-1].numel())
        values.append(torch.cat(chunks))
    if "layer" in plan.axes:
        coords["layer"] = tuple(plan.layers)
    order = [axis for axis in ("layer", *inner) if axis in coords]
    stacked = torch.stack(values).movedim(-1, 0)  # [pair, layer, world]
    stacked = stacked.reshape(len(run.series), *(len(coords[axis]) for axis in order))
    stacked = stacked.permute(0, *(1 + order.index(axis) for axis in plan.axes))
    runs = read_runs(metric, run.output, clean_output)
    return (stacked, runs), {axis: coords[axis] for axis in plan.axes}


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
