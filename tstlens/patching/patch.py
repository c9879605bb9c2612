"""Replacing several sites at once: what a set of activations does together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.sites import Place, Site, axis_of, chosen, locate
from tstlens.patching.sources import (
    Reference,
    ReferenceMask,
    Source,
    found_sources,
    record,
)
from tstlens.shapes import Output, PairMask, PairSeries


@checked
@torch.no_grad()
def patch(
    model: HookedTST,
    clean: PairSeries,
    corrupted: PairSeries,
    sites: Sequence[Site] | Site,
    source: Source | Tensor = "clean",
    *,
    reference: Reference | None = None,
    reference_mask: ReferenceMask | None = None,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
) -> Output:
    """The model's output for the corrupted series with all of these sites replaced together.

    Every site is set to what it was in the clean run itself, not to what it would become after the
    earlier sites were replaced.

    Args:
        model: the model.
        clean: series [pair, channel, time].
        corrupted: series of the same shape.
        sites: what is replaced; a site of a block needs its layer.
        source: what replaces: ``"clean"``, ``"zero"``, ``"mean"`` or other series.
        reference: series for ``source="mean"``.
        reference_mask: bool [batch, time] of these.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.

    Returns:
        The patched output, [pair, class] or [pair, channel, horizon].

    Raises:
        UnknownSiteError, UnknownAxisError, SeriesShapeError, ArgumentError: as :func:`sweep`.
    """
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    sites = [sites] if isinstance(sites, Site) else list(sites)
    if not sites:
        raise ArgumentError("expected at least one site to replace, got none")
    places = [locate(model, site) for site in sites]
    for site, place in zip(sites, places, strict=True):
        if place.layered:
            raise ArgumentError(
                f"{site!r} does not say its layer; give Site({site.name!r}, layer=...)"
            )
    names = sorted({place.hook_name(place.layer) for place in places})
    acts = record(model, clean, clean_mask, names)[1]
    rows = ((clean, clean_mask), acts, (corrupted, corrupted_mask))
    hooks = []
    for site, place in zip(sites, places, strict=True):
        name = place.hook_name(place.layer)
        given, seen = found_sources(model, place, [name], source, *rows, reference, reference_mask)
        hooks.append((name, _replacing(place, site, given[name], seen[name])))
    return model.run_with_hooks(corrupted, mask=corrupted_mask, fwd_hooks=hooks)


def _replacing(place: Place, site: Site, source: Tensor, seen: Tensor | None) -> Any:
    """A hook that sets the site's entries to the source's, where both series observed them."""
    own = {axis_of(place, axis): index for axis, index in site.selections().items()}
    by_series = place.by_series(source)
    condition = torch.ones((), dtype=torch.bool, device=source.device) if seen is None else seen
    for number, axis in enumerate(place.axes):
        size = by_series.shape[1 + number]
        shape = [1] * by_series.ndim
        shape[1 + number] = size
        condition = condition & chosen(own.get(axis), size, axis).to(source.device).view(shape)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        del hook
        here = place.by_series(activation)
        return torch.where(condition, by_series, here).reshape(activation.shape)

    return replace
