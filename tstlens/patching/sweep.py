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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Positive, checked
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import PairData, check_pairs, described_by, spans_of
from tstlens.patching.metrics import MeasureOutput, as_metric, pair_blocks, read_runs
from tstlens.patching.outputs import Piece, Swept, assembled, measured
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Site
from tstlens.patching.sources import (
    Reference,
    ReferenceMask,
    Rows,
    Source,
    record,
    rows_of,
    sources,
)
from tstlens.patching.worlds import run_corrupted
from tstlens.shapes import PairMask


@checked
@torch.no_grad()
def sweep(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
    site: str | Site,
    axes: Sequence[str],
    metric: MeasureOutput,
    source: Source | Tensor = "clean",
    *,
    n_slices: int | None = None,
    slices: str | int | Sequence[tuple[int, int]] | None = None,
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
        clean: series [pair, channel, time] (one pair may come without the pair axis), or windows.
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
        n_slices: runs that axis ``"slice"`` cuts the last axis of an activation into.
        slices: runs of samples that axis ``"slice"`` cuts the series into (site ``"series"``): a
            unit of the calendar ("1D", "6h", "W") where ``clean`` are windows with dates, a number
            of samples, or (first, one past last) samples.
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
    words = described_by(clean, metric)
    spans = None if slices is None else spans_of(clean, slices)
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    if spans is not None and (n_slices is not None or "slice" not in axes):
        raise ArgumentError("slices= cuts the series along axis 'slice', and excludes n_slices=")
    what = Swept.found(model, site, axes, n_slices if spans is None else spans)
    metric = as_metric(metric, len(clean), model)
    with tqdm(total=0, desc=f"patching {what.site.name}", unit="run", disable=not progress) as bar:
        (result,) = swept_pairs(
            model,
            what,
            (clean, clean_mask),
            (corrupted, corrupted_mask),
            [metric],
            memory_mb,
            source,
            (reference, reference_mask),
            bar,
        )
    if spans is not None:
        result.made.update(slices=slices, spans=spans)
    return replace(result, **words)


def swept_pairs(
    model: HookedTST,
    what: Swept,
    clean: Rows,
    corrupted: Rows,
    metrics: Sequence[Metric],
    memory_mb: float | None,
    source: Source | Tensor = "clean",
    means: tuple[Tensor | None, Tensor | None] = (None, None),
    bar: Any = None,
) -> list[SweepResult]:
    """One sweep read with several metrics; the arguments are those of :func:`sweep`, checked."""
    n_pairs, place = len(clean[0]), what.place
    widest = min(metrics, key=lambda metric: bool(metric.targets))
    pieces: list[list[Piece]] = [[] for _ in metrics]
    coords: dict[str, tuple[Any, ...]] = {}
    for block in pair_blocks(n_pairs, widest):
        there, here = rows_of(*clean, block), rows_of(*corrupted, block)
        output, acts = record(model, *there, what.names)
        run = run_corrupted(model, *here, place, what.layers)
        own_source = source[block] if isinstance(source, Tensor) else source
        given = sources(model, place, what.names, own_source, there, acts, run, *means)
        of_pairs = [metric.of_pairs(block) for metric in metrics]
        progress = None if bar is None else (bar, n_pairs)
        values, coords = measured(model, run, what, given, of_pairs, memory_mb, progress)
        for own, one, of_metric in zip(of_pairs, values, pieces, strict=True):
            of_metric.append((one, read_runs(own, run.output, output)))
    return [
        assembled(
            SweepResult,
            model,
            metric,
            coords,
            of_metric,
            clean[0].shape[2],
            site=what.site_name,
            source=source if isinstance(source, str) else "other series",
            place=place,
            method="exact",
            n_slices=what.n_slices,
            **what.fixed,
        )
        for metric, of_metric in zip(metrics, pieces, strict=True)
    ]
