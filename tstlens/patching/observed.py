"""Which entries of an activation two runs both have: what may be replaced, and what means count.

One rule for every analysis that puts something of one run into another: an entry is replaced only
where what comes and what goes were both observed. Padding, and a missing value (NaN) in models that
take them, is nothing that one series could give to another; such an entry stays as it is, and the
effect of replacing it is 0. So what stands in padding changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tstlens.model import HookedTST
from tstlens.patching.sites import Place

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
    if not along or (mask is None and not bool(missing.any())):
        return dict.fromkeys(names)
    if along[0] == "time":
        seen = ~missing if mask is None else ~missing & mask[:, None]
        return {name: seen if name == "hook_series" else None for name in names}
    if along[0] == "pos":  # where this is one axis of several, queries and keys are channels
        along = ["pos"]
    state = model.embed_series(series, mask)[1]
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
    if seen is None:
        return given
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
