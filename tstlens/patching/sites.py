"""Sites: where in the model something is replaced.

A site is a hook point (by its short name and a layer, or by its full name) and a selection along
its axes. The axes of an activation, after the series (and its channels, where every channel goes
through the trunk by itself):

| sites                                                      | axes                 |
|------------------------------------------------------------|----------------------|
| resid_pre, resid_mid, resid_post, normalized_resid_post,   | pos, feature         |
| attn_out, mlp_out, mlp_pre, mlp_post, embed, pos_embed     |                      |
| q, k, v, z, result                                         | pos, head, feature   |
| pattern, attn_scores                                       | head, query, key     |
| channel_z, cross_z and so on, of blocks with a second      | as without the       |
| attention; resid_mid_channel, resid_mid_cross              | prefix               |
| channel_pattern, channel_attn_scores (query and key are    | pos, head, query,    |
| channels)                                                  | key                  |
| series                                                     | channel, time        |
| pooled                                                     | feature              |
| a spliced dictionary's ``….hook_sae_acts_post`` and so on  | pos, (head), feature |

A model with an encoder and a decoder has every site in both: ``z`` is all of its layers, numbered
through (encoder first), ``encoder_z`` and ``decoder_z`` are those of one stack; the cross attention
is the decoder's. ``encoded`` is what all cross attention reads, ``decoder_embed`` what enters the
decoder.

``slice`` cuts the feature axis into equal runs. ``pos`` means ``query`` on a pattern. Heads are
sites at z, before the output projection mixes them; a slice of ``attn_out`` is **not** a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tstlens.arguments import check_fields, checked
from tstlens.errors import ArgumentError, UnknownAxisError, UnknownHookError, UnknownSiteError
from tstlens.model import HookedTST
from tstlens.points import ALIASES, SITES, Index, in_block, real_name, select

# "hook_z" and "attn.hook_z", as TransformerLens' users say: sites by their hook within a block.
_SHORT = {
    alias: site
    for site, (template, _) in SITES.items()
    for alias in (f"hook_{site}", template.removeprefix("{block}."))
    if template.startswith("{block}.") and template.endswith(alias)
}
AXIS_ALIASES = {
    "head_index": "head",
    "dest_pos": "query",
    "src_pos": "key",
    "neuron": "feature",
    "latent": "feature",
}


@dataclass(frozen=True)
class Site:
    """A hook point and what of it is replaced; an axis that is not given is replaced whole.

    Args:
        name: short name (``"z"``, ``"mlp_out"``; ``"hook_z"`` means the same) or full hook name
            (``"blocks.0.hook_mlp_out"``).
        layer: block, for short names of things in a block; negative counts from the end.
        channel: channels, where the site has them.
        time: samples (site ``"series"``).
        pos: positions.
        head: heads.
        query: query positions of a pattern.
        key: key positions of a pattern.
        feature: entries of the last axis: dimensions of the stream, neurons, d_head.

    Each selection is an int, a slice or a sequence of ints.

    Example:
        >>> from tstlens.patching import Site
        >>> Site("mlp_out", layer=1, pos=slice(3, 9))
        Site('mlp_out', layer=1, pos=slice(3, 9, None))
    """

    name: str
    layer: int | None = None
    channel: Index = None
    time: Index = None
    pos: Index = None
    head: Index = None
    query: Index = None
    key: Index = None
    feature: Index = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "name", _SHORT.get(self.name, self.name))

    def __repr__(self) -> str:
        given = [
            f"{entry.name}={getattr(self, entry.name)!r}"
            for entry in fields(self)[1:]
            if getattr(self, entry.name) is not None
        ]
        return f"Site({', '.join([repr(self.name), *given])})"

    def selections(self) -> dict[str, Index]:
        """The given selections by axis."""
        names = ("channel", "time", "pos", "head", "query", "key", "feature")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Place:
    """A site as found in a model.

    Args:
        template: hook name with ``{block}`` in it, or a full one.
        axes: the activation's axes after the series.
        layer: the block it lies in; None where the template has to be filled or has no layer.
        n_series_channels: how many rows of the trunk belong to one series, where its axes begin
            with the channel; None where rows are series.
        blocks: names of the model's layers in order, ``"blocks.0"`` or ``"encoder.0"`` and so on.
        layers: the layers that have the site; of a place outside the blocks None alone.
        crosses: whether it lies between an encoder and a decoder.
    """

    template: str
    axes: tuple[str, ...]
    layer: int | None
    n_series_channels: int | None = None
    blocks: tuple[str, ...] = ()
    layers: tuple[int | None, ...] = (None,)
    crosses: bool = False

    @property
    def layered(self) -> bool:
        """Whether a layer still has to be chosen."""
        return "{block}" in self.template

    @property
    def kind(self) -> str:
        """The hook name without its layer: what decides where in a block the site lies."""
        if self.layered:
            return self.template.removeprefix("{block}.")
        found = in_block(self.template)
        return self.template if found is None else found[2]

    @property
    def in_trunk(self) -> bool:
        """Whether it lies in a block."""
        return self.layered or in_block(self.template) is not None

    @property
    def in_decoder(self) -> bool:
        """Whether its positions are a decoder's."""
        if self.layered:
            return any(self.blocks[layer or 0].startswith("decoder") for layer in self.layers)
        return self.template.startswith(("decoder", "hook_decoder"))

    def hook_name(self, layer: int | None) -> str:
        """The full hook name at a layer."""
        return self.template.format(block=None if layer is None else self.blocks[layer])

    def by_series(self, activation: Tensor) -> Tensor:
        """[row, ...] as [series, ...], with a channel axis where the trunk runs per channel."""
        if self.n_series_channels is None:
            return activation
        return activation.unflatten(0, (-1, self.n_series_channels))


@checked
def site_names(model: HookedTST) -> list[str]:
    """Short names of the sites that this model has."""
    names = [name for name, (template, _) in SITES.items() if _having(model, template)]
    if model.cfg.n_decoder_layers:
        n_layers = model.cfg.n_layers
        layered = [name for name in names if len(_having(model, SITES[name][0])) == n_layers]
        stacks = [f"{stack}_{name}" for stack in _STACKS for name in layered]
        names += [name for name in stacks if _having(model, *_of_stack(model, name))]
    return names


_STACKS = ("encoder", "decoder")


def _of_stack(model: HookedTST, name: str) -> tuple[str, range]:
    """Template and layers of a short name, which may start with a stack's name."""
    first, n_layers = model.cfg.n_encoder_layers, model.cfg.n_layers
    spans = {"encoder": range(first), "decoder": range(first, n_layers)}
    stack, _, rest = name.partition("_")
    if name not in SITES and model.cfg.n_decoder_layers and stack in spans:
        template = SITES.get(rest, ("", ""))[0]
        return template if "{block}" in template else "", spans[stack]
    return SITES.get(name, ("", ""))[0], range(n_layers)


def _having(
    model: HookedTST, template: str, layers: Sequence[int] | None = None
) -> tuple[int | None, ...]:
    """The layers that have a site; None alone for one outside the blocks that is there."""
    if "{block}" not in template:
        return (None,) if template in model.hook_dict else ()
    among = range(model.cfg.n_layers) if layers is None else layers
    names = {layer: template.format(block=model.layer_name(layer)) for layer in among}
    return tuple(layer for layer, name in names.items() if name in model.hook_dict)


def locate(model: HookedTST, site: Site) -> Place:
    """Find a site in a model.

    Raises:
        UnknownSiteError: the model has no such site.
        UnknownAxisError: a selection names an axis that the site lacks.
        ArgumentError: the layer does not exist.
    """
    template, layer, layers = _template(model, site)
    point = model.point(template.format(block=model.layer_name(layers[0] or 0)))
    if not point.layout:
        raise UnknownSiteError(
            point.name, SITES, "This hook point's axes are not known to patching"
        )
    axes, channels = point.axes, None
    if model.cfg.channel_independent and point.by_row:
        channels = model.cfg.rows_per_series
        axes = ("channel", *axes)
    place = Place(
        template,
        axes,
        layer,
        channels,
        tuple(map(model.layer_name, range(model.cfg.n_layers))),
        layers,
        model.crosses(template),
    )
    for axis in site.selections():
        if axis_of(place, axis) not in place.axes:
            raise UnknownAxisError(axis, axes, f"Site {site.name!r} of this model has these")
    return place


def _template(model: HookedTST, site: Site) -> tuple[str, int | None, tuple[int | None, ...]]:
    """Template or full hook name, the one layer where it is fixed, and the layers there are."""
    meant = [_SHORT.get(name, name) for name in ALIASES.get(site.name, (site.name,))]
    for name in meant:
        template, among = _of_stack(model, name)
        layers = _having(model, template, among) if template else ()
        if not layers:
            continue
        if "{block}" not in template:
            if site.layer is not None:
                raise ArgumentError(f"site {site.name!r} lies in no layer; leave layer out")
            return template, None, layers
        if site.layer is None:
            return template, None, layers
        n_layers = model.cfg.n_layers
        if not -n_layers <= site.layer < n_layers or site.layer % n_layers not in layers:
            raise ArgumentError(f"expected a layer in {layers[0]}..{layers[-1]}, got {site.layer}")
        layer = site.layer % n_layers
        return template.format(block=model.layer_name(layer)), layer, (layer,)
    name = real_name(site.name, model.hook_dict)
    if name in model.hook_dict:
        layer = model.layer_of(name)
        return name, layer, (layer,)
    if "." in site.name or site.name.startswith("hook_"):
        raise UnknownHookError(site.name, model.hook_dict, "model.hook_dict lists them all")
    raise UnknownSiteError(
        site.name, site_names(model), "A full hook name (see model.hook_dict) works too"
    )


def axis_of(place: Place, axis: str) -> str:
    """An axis' own name at a place: aliases resolved, what ``slice`` cuts, pos on a pattern."""
    axis = AXIS_ALIASES.get(axis, axis)
    if axis == "slice":
        return "time" if "time" in place.axes else "feature"
    return "query" if axis == "pos" and "pos" not in place.axes and "query" in place.axes else axis


def chosen(selection: Index, size: int, axis: str) -> Tensor:
    """A selection as a bool mask over an axis.

    Raises:
        ArgumentError: an index lies outside the axis, or nothing is selected.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    mask[select(selection, size, axis)] = True
    return mask
