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

The axes of every hook point's activation, after the series.

A place outside the blocks that has its channels as an axis says so; elsewhere the channel axis of
models whose channels go through the trunk one by one is put before these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral

import torch
from torch import Tensor

from tstlens.arguments import check_fields, check_slice, checked
from tstlens.errors import ArgumentError, UnknownAxisError, UnknownHookError, UnknownSiteError
from tstlens.model import HookedTST

_PER_POS = ("pos", "feature")
_PER_HEAD = ("pos", "head", "feature")
_PER_QUERY = ("head", "query", "key")
LEAVES = {  # last part of a hook name -> axes
    "hook_resid_pre": _PER_POS,
    "hook_resid_mid": _PER_POS,
    "hook_resid_post": _PER_POS,
    "hook_normalized_resid_post": _PER_POS,
    "hook_attn_out": _PER_POS,
    "hook_attn_mlp_sum": _PER_POS,
    "hook_mlp_in": _PER_POS,
    "hook_mlp_out": _PER_POS,
    "hook_embed": _PER_POS,
    "hook_pos_embed": _PER_POS,
    "hook_scale": _PER_POS,
    "hook_normalized": _PER_POS,
    "mlp.hook_pre": _PER_POS,
    "mlp.hook_post": _PER_POS,
    "hook_q": _PER_HEAD,
    "hook_k": _PER_HEAD,
    "hook_v": _PER_HEAD,
    "hook_z": _PER_HEAD,
    "hook_result": _PER_HEAD,
    "hook_q_input": _PER_HEAD,
    "hook_k_input": _PER_HEAD,
    "hook_v_input": _PER_HEAD,
    "hook_pattern": _PER_QUERY,
    "hook_attn_scores": _PER_QUERY,
    "channel_attn.hook_pattern": ("pos", *_PER_QUERY),
    "channel_attn.hook_attn_scores": ("pos", *_PER_QUERY),
    "hook_channel_attn_out": _PER_POS,
    "hook_cross_attn_out": _PER_POS,
    "hook_resid_mid_channel": _PER_POS,
    "hook_resid_mid_cross": _PER_POS,
    "mlp.hook_pre_linear": _PER_POS,
    "hook_encoded": _PER_POS,
    "hook_decoder_embed": _PER_POS,
    "hook_position_bias": _PER_QUERY,
    "hook_decoder_position_bias": _PER_QUERY,
    "hook_series": ("channel", "time"),
    "hook_pooled": ("feature",),
    "embed.hook_loc": ("channel", "feature"),
    "embed.hook_scale": ("channel", "feature"),
    "embed.hook_scaled": ("channel", "time"),
    "embed.hook_patches": ("channel", *_PER_POS),
    "embed.hook_patch_mask": ("channel", "pos"),
    "embed.hook_observed": ("channel", *_PER_POS),
    "embed.hook_freq": ("channel", "feature"),
    "embed.hook_pos_embed": ("channel", *_PER_POS),
    "embed.hook_times": ("channel", *_PER_POS),
    "embed.hook_running_loc": ("channel", *_PER_POS),
    "embed.hook_running_scale": ("channel", *_PER_POS),
    "embed.block.hook_pre": ("channel", *_PER_POS),
    "embed.block.hook_post": ("channel", *_PER_POS),
    "head.hook_scaled": ("channel", "time"),
    "head.hook_quantiles": ("channel", "time", "feature"),
    "head.block.hook_pre": ("feature",),
    "head.block.hook_post": ("feature",),
    "head.hook_future": _PER_POS,
    "patch_block.hook_pre": _PER_POS,
    "patch_block.hook_post": _PER_POS,
    "spread_block.hook_pre": ("feature",),
    "spread_block.hook_post": ("feature",),
    "head.hook_parameters": ("channel", "time", "feature"),
}


Index = int | slice | Sequence[int] | None

_TEMPLATES = {
    "series": "hook_series",
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "pooled": "head.hook_pooled",
    "encoded": "hook_encoded",
    "decoder_embed": "hook_decoder_embed",
    **{
        name: f"blocks.{{layer}}.hook_{name}"
        for name in (
            "resid_pre",
            "resid_mid",
            "resid_post",
            "normalized_resid_post",
            "attn_out",
            "mlp_out",
        )
    },
    **{
        name: f"blocks.{{layer}}.attn.hook_{name}"
        for name in ("q", "k", "v", "z", "result", "pattern", "attn_scores")
    },
    **{
        f"{which}_{name}": f"blocks.{{layer}}.{which}_attn.hook_{name}"
        for which in ("channel", "cross")
        for name in ("q", "k", "v", "z", "result", "pattern", "attn_scores")
    },
    **{
        name: f"blocks.{{layer}}.hook_{name}"
        for name in ("channel_attn_out", "cross_attn_out", "resid_mid_channel", "resid_mid_cross")
    },
    "mlp_pre": "blocks.{layer}.mlp.hook_pre",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
}
# "hook_z" and "attn.hook_z", as TransformerLens' users say: sites by their hook within a block.
_SHORT = {
    alias: name
    for name, template in _TEMPLATES.items()
    for alias in (f"hook_{name}", template.removeprefix("blocks.{layer}."))
    if template.startswith("blocks.{layer}.") and template.endswith(alias)
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
        template: hook name with ``{layer}`` in it, or a full one.
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
        return "{layer}" in self.template

    @property
    def kind(self) -> str:
        """The hook name without its layer: what decides where in a block the site lies."""
        in_block = self.in_trunk
        return self.template.split(".", 2)[-1] if in_block else self.template

    @property
    def in_trunk(self) -> bool:
        """Whether it lies in a block."""
        return self.template.split(".")[0] in ("blocks", "encoder", "decoder")

    @property
    def in_decoder(self) -> bool:
        """Whether its positions are a decoder's."""
        if self.layered:
            return any(self.blocks[layer or 0].startswith("decoder") for layer in self.layers)
        return self.template.startswith(("decoder", "hook_decoder"))

    def hook_name(self, layer: int | None) -> str:
        """The full hook name at a layer."""
        if layer is not None and self.layered and self.blocks:
            return self.template.replace("blocks.{layer}", self.blocks[layer])
        return self.template.format(layer=layer)

    def by_series(self, activation: Tensor) -> Tensor:
        """[row, ...] as [series, ...], with a channel axis where the trunk runs per channel."""
        if self.n_series_channels is None:
            return activation
        return activation.unflatten(0, (-1, self.n_series_channels))


@checked
def site_names(model: HookedTST) -> list[str]:
    """Short names of the sites that this model has."""
    names = [name for name, template in _TEMPLATES.items() if _having(model, template)]
    if model.cfg.n_decoder_layers:
        n_layers = model.cfg.n_layers
        layered = [name for name in names if len(_having(model, _TEMPLATES[name])) == n_layers]
        stacks = [f"{stack}_{name}" for stack in _STACKS for name in layered]
        names += [name for name in stacks if _having(model, *_of_stack(model, name))]
    return names


_STACKS = ("encoder", "decoder")


def _of_stack(model: HookedTST, name: str) -> tuple[str, range]:
    """Template and layers of a short name, which may start with a stack's name."""
    first, n_layers = model.cfg.n_encoder_layers, model.cfg.n_layers
    spans = {"encoder": range(first), "decoder": range(first, n_layers)}
    stack, _, rest = name.partition("_")
    if name not in _TEMPLATES and model.cfg.n_decoder_layers and stack in spans:
        name = rest if "{layer}" in _TEMPLATES.get(rest, "") else name
        return _TEMPLATES.get(name, ""), spans[stack]
    return _TEMPLATES.get(name, ""), range(n_layers)


def _having(
    model: HookedTST, template: str, layers: Sequence[int] | None = None
) -> tuple[int | None, ...]:
    """The layers that have a site; None alone for one outside the blocks that is there."""
    if "{layer}" not in template:
        return (None,) if template in model.hook_dict else ()
    among = range(model.cfg.n_layers) if layers is None else layers
    names = {layer: model.layer_name(layer) for layer in among}
    return tuple(
        layer
        for layer, block in names.items()
        if template.replace("blocks.{layer}", block) in model.hook_dict
    )


def locate(model: HookedTST, site: Site) -> Place:
    """Find a site in a model.

    Raises:
        UnknownSiteError: the model has no such site.
        UnknownAxisError: a selection names an axis that the site lacks.
        ArgumentError: the layer does not exist.
    """
    template, layer, layers = _template(model, site)
    name = (
        template
        if layer is not None
        else template.replace("blocks.{layer}", model.layer_name(layers[0] or 0))
    )
    axes = _axes_of(name) if ".hook_sae_" not in name else _axes_of_spliced(model, name)
    channels = None
    mixes_channels = "channel_attn" in template and "query" in axes
    by_itself = "channel" in axes  # an activation that has its channels as an axis
    if model.cfg.channel_independent and axes and not by_itself and not mixes_channels:
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
    template, among = _of_stack(model, _SHORT.get(site.name, site.name))
    layers = _having(model, template, among) if template else ()
    if layers:
        if "{layer}" not in template:
            if site.layer is not None:
                raise ArgumentError(f"site {site.name!r} lies in no layer; leave layer out")
            return template, None, layers
        if site.layer is None:
            return template, None, layers
        n_layers = model.cfg.n_layers
        if not -n_layers <= site.layer < n_layers or site.layer % n_layers not in layers:
            raise ArgumentError(f"expected a layer in {layers[0]}..{layers[-1]}, got {site.layer}")
        layer = site.layer % n_layers
        name = template.replace("blocks.{layer}", model.layer_name(layer))
        return name, layer, (layer,)
    if site.name in model.hook_dict:
        layer = model.layer_of(site.name)
        return site.name, layer, (layer,)
    if "." in site.name or site.name.startswith("hook_"):
        raise UnknownHookError(site.name, model.hook_dict, "model.hook_dict lists them all")
    raise UnknownSiteError(
        site.name, site_names(model), "A full hook name (see model.hook_dict) works too"
    )


def _axes_of(hook_name: str) -> tuple[str, ...]:
    leaf = hook_name.rsplit(".", 1)[-1]
    ends = (hook_name, ".".join(hook_name.split(".")[-2:]), leaf)
    axes = next((LEAVES[end] for end in ends if end in LEAVES), None)
    if axes is None:
        raise UnknownSiteError(
            hook_name, _TEMPLATES, "This hook point's axes are not known to patching"
        )
    return axes


def _axes_of_spliced(model: HookedTST, hook_name: str) -> tuple[str, ...]:
    """Axes of a spliced dictionary's activation: those of the place, heads joined where it does."""
    writes, leaf = hook_name.rsplit(".", 1)
    splice = model.splice_at(writes)
    at_output = leaf in ("hook_sae_error", "hook_sae_output")
    axes = _axes_of(writes if at_output or splice is None else splice.reads)
    if splice is None:
        return axes
    joined = splice.joins_heads(model.cfg.d_head or 0) and not at_output
    gone = "head" if joined or splice.head is not None else ""
    return tuple(axis for axis in axes if axis != gone)


def axis_of(place: Place, axis: str) -> str:
    """An axis' own name at a place: aliases resolved, ``slice`` as feature, pos on a pattern."""
    axis = AXIS_ALIASES.get(axis, axis)
    if axis == "slice":
        return "feature"
    return "query" if axis == "pos" and "pos" not in place.axes and "query" in place.axes else axis


def chosen(selection: Index, size: int, axis: str) -> Tensor:
    """A selection as a bool mask over an axis.

    Raises:
        ArgumentError: an index lies outside the axis, or nothing is selected.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    if selection is None:
        return ~mask
    if isinstance(selection, slice):
        check_slice(selection, size, axis)
    indices = range(size)[selection] if isinstance(selection, slice) else selection
    for index in [indices] if isinstance(indices, int | Integral) else indices:
        if not -size <= index < size:
            raise ArgumentError(f"expected {axis} in 0..{size - 1}, got {index}")
        mask[index] = True
    if not mask.any():
        raise ArgumentError(f"{axis}={selection} selects nothing of 0..{size - 1}")
    return mask
