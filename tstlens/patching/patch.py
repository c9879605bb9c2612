"""Replacing several sites at once: what a set of activations does together.

The patch setters of ``transformer_lens.patching``, with their names and results.

A setter puts the entries that an index stands for from a clean activation into a corrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import checked, shown
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.patching.checks import PairData, check_pairs
from tstlens.patching.sites import AXIS_ALIASES, Place, Site, axis_of, chosen, locate
from tstlens.patching.sources import (
    Reference,
    ReferenceMask,
    Source,
    found_sources,
    record,
)
from tstlens.shapes import Output, PairMask


@checked
@torch.no_grad()
def patch(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
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


class PatchSetter:
    """One of TransformerLens' patch setters: which entries of an activation an index stands for.

    Args:
        name: the setter's name.
        index_axis_names: what an index holds, in this order.
        activation_axes: the activation's first axes after the rows.
    """

    def __init__(
        self, name: str, index_axis_names: tuple[str, ...], activation_axes: tuple[str, ...]
    ) -> None:
        self.__name__ = name
        self.index_axis_names, self.activation_axes = index_axis_names, activation_axes
        self.__doc__ = (
            f"Patch the entries at [{', '.join(index_axis_names)}] of an activation "
            f"[row, {', '.join(activation_axes)}, ...], in place; returns the activation."
        )

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"

    def __call__(
        self, corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
    ) -> Tensor:
        """Patch.

        Args:
            corrupted_activation: [row, ...], changed in place.
            index: the layer and the entries.
            clean_activation: [row, ...].

        Returns:
            The corrupted activation.

        Raises:
            ArgumentError: an index of another length.
        """
        if len(index) != len(self.index_axis_names):
            raise ArgumentError(
                f"{self.__name__} takes an index ({', '.join(self.index_axis_names)}), got "
                f"{shown(list(index))}"
            )
        entries = dict(zip(map(_axis, self.index_axis_names), index, strict=True))
        at = (slice(None), *(entries.get(axis, slice(None)) for axis in self.activation_axes))
        corrupted_activation[at] = clean_activation[at]
        return corrupted_activation

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise :class:`ArgumentError` unless these name what an index holds, in its order."""
        expected, given = (list(map(_axis, axes)) for axes in (self.index_axis_names, names))
        if "query" in self.activation_axes:
            given = ["query" if axis == "pos" else axis for axis in given]
        if given != expected:
            raise ArgumentError(
                f"{self.__name__} takes ({', '.join(self.index_axis_names)}) in this order, got "
                f"({', '.join(names)})"
            )


def _axis(name: str) -> str:
    return AXIS_ALIASES.get(name, name)


_PER_QUERY = ("head", "query", "key")
layer_pos_patch_setter = PatchSetter("layer_pos_patch_setter", ("layer", "pos"), ("pos",))
layer_pos_head_vector_patch_setter = PatchSetter(
    "layer_pos_head_vector_patch_setter", ("layer", "pos", "head_index"), ("pos", "head")
)
layer_head_vector_patch_setter = PatchSetter(
    "layer_head_vector_patch_setter", ("layer", "head_index"), ("pos", "head")
)
layer_head_pattern_patch_setter = PatchSetter(
    "layer_head_pattern_patch_setter", ("layer", "head_index"), _PER_QUERY
)
layer_head_pos_pattern_patch_setter = PatchSetter(
    "layer_head_pos_pattern_patch_setter", ("layer", "head_index", "dest_pos"), _PER_QUERY
)
layer_head_dest_src_pos_pattern_patch_setter = PatchSetter(
    "layer_head_dest_src_pos_pattern_patch_setter",
    ("layer", "head_index", "dest_pos", "src_pos"),
    _PER_QUERY,
)
