"""What replaces an activation: the clean run's, zero, a mean, or another series'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.patching.observed import Observed, both, observed, replacing
from tstlens.patching.sites import Place
from tstlens.patching.worlds import CorruptedRun

Source = Literal["clean", "zero", "mean"]
# Axes of their own: our errors say what is wrong with a reference of another length.
Reference = Float[Tensor, "reference _ _"]
ReferenceMask = Bool[Tensor, "reference _"]
Rows = tuple[Tensor, Tensor | None]  # series and their mask
_BATCH = 128  # reference series whose activations are held at once


def record(
    model: HookedTST, series: Tensor, mask: Tensor | None, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output and the named activations."""
    return model.run_with_cache(
        series, mask=mask, names_filter=list(names), return_cache_object=False
    )


def sources(
    model: HookedTST,
    place: Place,
    names: Sequence[str],
    source: Source | Tensor,
    clean: Rows,
    clean_acts: dict[str, Tensor],
    run: CorruptedRun,
    *means: Tensor | None,
) -> dict[str, Tensor]:
    """What replaces each named activation of the corrupted run, in its shape.

    Entries that either side did not observe are the corrupted run's own. The arguments and errors
    are those of :func:`found_sources`.
    """
    corrupted = (run.series, run.mask)
    acts, seen = found_sources(model, place, names, source, clean, clean_acts, corrupted, *means)
    return {name: replacing(place, acts[name], run.acts[name], seen[name]) for name in names}


def found_sources(
    model: HookedTST,
    place: Place,
    names: Sequence[str],
    source: Source | Tensor,
    clean: Rows,
    clean_acts: dict[str, Tensor],
    corrupted: Rows,
    reference: Tensor | None = None,
    reference_mask: Tensor | None = None,
) -> tuple[dict[str, Tensor], Observed]:
    """The named activations of the source, and which entries it and the corrupted run observed.

    Raises:
        ArgumentError: the source is not known, or ``"mean"`` has no reference series.
        SeriesShapeError: the source series give activations of another shape, or a mean is needed
            where no reference series was observed.
    """
    here = observed(model, place, names, *corrupted)
    there: Observed = dict.fromkeys(names)
    if isinstance(source, Tensor):
        model.check_series(source, clean[1])
        acts = record(model, source, clean[1], names)[1]
        there = observed(model, place, names, source, clean[1])
    elif source == "clean":
        acts = clean_acts
        there = observed(model, place, names, *clean)
    elif source == "zero":
        acts = {name: torch.zeros_like(clean_acts[name]) for name in names}
    elif source == "mean":
        if reference is None:
            raise ArgumentError(
                "source='mean' needs reference=: series [batch, channel, time] to average over, "
                "training data say"
            )
        reference = check_reference(model, reference, reference_mask, corrupted[0])
        means = mean_activations(model, place, names, (reference, reference_mask), here)
        acts = {
            name: means[name]
            .expand_as(place.by_series(clean_acts[name]))
            .reshape(clean_acts[name].shape)
            for name in names
        }
    else:
        raise ArgumentError(
            "source must be 'clean', 'zero', 'mean' or series [pair, channel, time], "
            f"got {source!r}"
        )
    for name in names:
        if acts[name].shape != clean_acts[name].shape:
            raise SeriesShapeError(
                f"the source series must give activations like the clean series': {name} is "
                f"{list(acts[name].shape)}, expected {list(clean_acts[name].shape)}"
            )
    return acts, both(here, there)


def check_reference(
    model: HookedTST, reference: Tensor, mask: Tensor | None, series: Tensor
) -> Tensor:
    """Reference series with zeros for padding, checked: one at least, of the series' shape."""
    model.check_series(reference, mask)
    if not len(reference):
        raise ArgumentError("expected at least one reference series, got none")
    if reference.shape[1:] != series.shape[1:]:
        raise SeriesShapeError(
            f"the reference series must be [batch, channel={series.shape[1]}, "
            f"time={series.shape[2]}] like the series, got {list(reference.shape)}"
        )
    return blanked(reference, mask)


def mean_activations(
    model: HookedTST,
    place: Place,
    names: Sequence[str],
    reference: Rows,
    needed: Observed,
    recorded: Callable[[Tensor, Tensor | None], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Means over the series that observed each entry, at every position and channel by itself.

    Args:
        model: the model.
        place: the site.
        names: hook names.
        reference: series and mask.
        needed: which entries of the series studied are to be replaced, as :func:`observed` says.
        recorded: gives what is averaged; None for the activations.

    Returns:
        [1, *axes] by name; 0 where nothing was observed and nothing is needed.

    Raises:
        SeriesShapeError: no reference series observed an entry that is needed.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for start in range(0, len(reference[0]), _BATCH):
        rows = slice(start, start + _BATCH)
        series, mask = reference[0][rows], None if reference[1] is None else reference[1][rows]
        acts = record(model, series, mask, names)[1] if recorded is None else recorded(series, mask)
        seen = observed(model, place, names, series, mask)
        for name in names:
            by_series, weight = place.by_series(acts[name]), seen[name]
            if weight is None:
                weight = by_series.new_ones((), dtype=torch.bool).expand(
                    len(series), *(1,) * (by_series.ndim - 1)
                )
            total = torch.where(weight, by_series, 0.0).sum(0, keepdim=True)
            totals[name] = totals.get(name, 0.0) + total
            counts[name] = counts.get(name, 0) + weight.sum(0, keepdim=True)
    for name in names:
        _check_means(place, name, counts[name] == 0, needed[name])
    return {name: totals[name] / counts[name].clamp(min=1) for name in names}


def _check_means(place: Place, name: str, lacking: Tensor, needed: Tensor | None) -> None:
    if needed is not None:
        lacking = lacking & needed.any(0, keepdim=True)
    if bool(lacking.any()):
        along = next(axis for axis in ("time", "pos", "query") if axis in place.axes)
        at = int(lacking.nonzero()[0, 1 + place.axes.index(along)])
        raise SeriesShapeError(
            f"{'sample' if along == 'time' else 'position'} {at} of {name.split('hook_')[-1]!r} is "
            "padding in every reference series, or missing, so it has no mean; give reference "
            "series that reach as far"
        )
