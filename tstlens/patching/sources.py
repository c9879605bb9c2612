"""What replaces an activation: the clean run's, zero, a mean, or another series'.

Which entries of an activation two runs both have: what may be replaced, and what means count.

One rule for every analysis that puts something of one run into another: an entry is replaced only
where what comes and what goes were both observed. Padding, and a missing value (NaN) in models that
take them, is nothing that one series could give to another; such an entry stays as it is, and the
effect of replacing it is 0. So what stands in padding changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.patching.sites import Place
from tstlens.patching.worlds import CorruptedRun

Observed = dict[str, Tensor | None]  # hook name -> bool [series, *axes or 1], None for everything


@torch.no_grad()
def observed(
    model: HookedTST, place: Place, names: Sequence[str], series: Tensor, mask: Tensor | None
) -> Observed:
    """Which entries of each named activation hold something that was observed.

    Args:
        model: the model.
        place: the site, whose axes the activations have.
        names: hook names.
        series: [series, channel, time].
        mask: bool [series, time] or None.
    """
    along = [axis for axis in ("time", "pos", "query", "key") if axis in place.axes]
    missing = series.isnan()
    if not along or (mask is None and not (along[0] == "time" and bool(missing.any()))):
        return dict.fromkeys(names)
    if along[0] == "time":
        seen = ~missing if mask is None else ~missing & mask[:, None]
        return {name: seen if name == "hook_series" else None for name in names}
    if along[0] == "pos":  # where this is one axis of several, queries and keys are channels
        along = ["pos"]
    # A position whose samples are missing is one that the model reads; padding is not.
    state = model.embed_series(torch.nan_to_num(series), mask)[1]
    found: Observed = {}
    for name in names:
        whole = None
        for axis in along:
            at = name.replace("hook_pattern", "hook_v").replace("hook_attn_scores", "hook_v")
            part = model.observed_at(at if axis == "key" else name, state)
            if part is not None:
                part = _along(place, axis, part, len(series))
                whole = part if whole is None else whole & part
        found[name] = whole
    return found


def both(here: Observed, there: Observed) -> Observed:
    """Which entries two runs both observed."""
    found: Observed = {}
    for name, one in here.items():
        other = there[name]
        found[name] = other if one is None else one if other is None else one & other
    return found


def replacing(place: Place, given: Tensor, here: Tensor, seen: Tensor | None) -> Tensor:
    """What replaces an activation: the given one where it may, else what stands here.

    Args:
        place: the site.
        given: what replaces, [row, ...].
        here: the activation of the run that goes on, [row, ...].
        seen: which entries both runs observed.
    """
    sizes = place.by_series(given).shape
    if seen is None or any(n not in (1, size) for n, size in zip(seen.shape, sizes, strict=True)):
        return given  # of a point whose positions are not the trunk's: patches without a token, say
    return torch.where(seen, place.by_series(given), place.by_series(here)).reshape(here.shape)


def _along(place: Place, axis: str, pos_mask: Tensor, n_series: int) -> Tensor:
    """bool [row, pos] as [series, *axes or 1]."""
    by_series = pos_mask.unflatten(0, (n_series, -1))  # [series, row of it, pos]
    shape = [n_series] + [1] * len(place.axes)
    shape[1 + place.axes.index(axis)] = by_series.shape[2]
    if place.n_series_channels is None:
        return by_series.any(1).view(shape)
    shape[1] = by_series.shape[1]
    return by_series.view(shape)


Source = Literal["clean", "zero", "mean"]
# Axes of their own: our errors say what is wrong with a reference of another length.
Reference = Float[Tensor, "reference _ _"]
ReferenceMask = Bool[Tensor, "reference _"]
Rows = tuple[Tensor, Tensor | None]  # series and their mask
_BATCH = 128  # reference series whose activations are held at once


def rows_of(series: Tensor, mask: Tensor | None, rows: slice) -> Rows:
    """Some of the series, with their masks."""
    return series[rows], None if mask is None else mask[rows]


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
        series, mask = rows_of(*reference, slice(start, start + _BATCH))
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
