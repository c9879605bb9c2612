"""What replaces an activation: the clean run's, zero, a mean, or another series'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.patching.sites import Place

Source = Literal["clean", "zero", "mean"]


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
    clean_acts: dict[str, Tensor],
    reference: Tensor | None,
    clean_mask: Tensor | None,
) -> dict[str, Tensor]:
    """What replaces each named activation, in the clean activation's shape.

    Raises:
        ArgumentError: the source is not known, or ``"mean"`` has no reference series.
        SeriesShapeError: the source series give activations of another shape.
    """
    if isinstance(source, Tensor):
        model.check_series(source)
        acts = record(model, source, clean_mask, names)[1]
    elif source == "clean":
        acts = clean_acts
    elif source == "zero":
        acts = {name: torch.zeros_like(clean_acts[name]) for name in names}
    elif source == "mean":
        if reference is None:
            raise ArgumentError(
                "source='mean' needs reference=: series [batch, channel, time] to average over, "
                "training data say"
            )
        check_reference(model, reference)
        recorded = record(model, reference, None, names)[1]
        acts = {name: _mean(place, recorded[name], clean_acts[name]) for name in names}
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
    return acts


def check_reference(model: HookedTST, reference: Tensor, mask: Tensor | None = None) -> None:
    """Raise unless these are series for the model, one at least."""
    model.check_series(reference, mask)
    if not len(reference):
        raise ArgumentError("expected at least one reference series, got none")


def _mean(place: Place, acts: Tensor, like: Tensor) -> Tensor:
    """The mean over series, at every position and channel by itself, repeated for each series."""
    mean = place.by_series(acts).mean(0, keepdim=True)
    wanted = place.by_series(like).shape
    if mean.shape[1:] != wanted[1:]:
        raise SeriesShapeError(
            f"the reference series give activations {list(mean.shape[1:])} per series, expected "
            f"{list(wanted[1:])}: they must have the clean series' channels and length"
        )
    return mean.expand(wanted).reshape(like.shape)
