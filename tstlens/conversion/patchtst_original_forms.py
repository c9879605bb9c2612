"""The two forms of the original PatchTST, from a state dict and options to the hooked model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.named_layers import Entries, fill_layer, flatten_by_pos, linear
from tstlens.conversion.patchtst_original_source import BACKBONE_LAYER
from tstlens.conversion.tsl_layers import EPS, STACK, fill_trunk
from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig
from tstlens.model.families.flat_head import FlatHeadConfig
from tstlens.model.families.revin import RevINPatchesConfig

NAME = "patchtst-original"


def backbone(
    entries: Entries,
    options: dict[str, Any],
    n_time: int | None,
    class_names: tuple[str, ...] | None,
) -> HookedTST:
    """The hooked model of ``PatchTST_backbone`` (the authors, neuralforecast).

    Args:
        entries: the state dict.
        options: what it does not tell; ``n_heads`` is filled in.
        n_time: samples of a series, or None.
        class_names: one name per logit.
    """
    if any(name.startswith(("model_trend.", "model_res.")) for name in entries):
        raise UnsupportedSourceError(
            "decomposition is not covered: trend and remainder go through two trunks"
        )
    at = "model." if "model.backbone.W_pos" in entries else ""
    stack = f"{at}backbone.encoder.layers."
    positions = entries[f"{at}backbone.W_pos"]
    d_model = len(entries[f"{at}backbone.W_P.weight"])
    n_layers, n_pos = entries.n_layers(stack), len(positions)
    scales = {float(entries[f"{stack}{layer}.{BACKBONE_LAYER.scale}"]) for layer in range(n_layers)}
    if len(scales) > 1:
        raise UnsupportedSourceError(
            f"the layers scale their scores differently ({sorted(scales)}); one HookedTST has one "
            "attn_scale"
        )
    scale = scales.pop()
    n_heads = options["n_heads"] = options["n_heads"] or max(1, round(d_model * scale**2))
    affine = f"{at}revin_layer.affine_weight" in entries
    individual = f"{at}head.linears.0.weight" in entries
    channels = _channels(entries, options, at, affine, individual)
    maps = [f"{at}head.linears.{c}" for c in range(channels)] if individual else []
    maps = maps or [f"{at}head.linear"]
    query = entries[f"{stack}0.self_attn.W_Q.weight"]
    if len(query) % n_heads:
        raise ArgumentError(
            f"queries have {len(query)} outputs, which do not divide into n_heads={n_heads} heads; "
            "give n_heads="
        )
    per_step = options["n_quantiles"] or 1
    n_out = len(entries[f"{maps[0]}.weight"])
    if n_out % per_step:
        raise ArgumentError(
            f"the {n_out} outputs do not divide into n_quantiles={per_step} per step"
        )
    embed = _embed(entries[f"{at}backbone.W_P.weight"], options, affine, 1e-5 * 1e-5)
    cfg = HookedTSTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=len(query) // n_heads,
        d_mlp=len(entries[f"{stack}0.ff.0.weight"]),
        embed=embed,
        head=FlatHeadConfig(
            horizon=n_out // per_step,
            n_quantiles=options["n_quantiles"],
            individual=individual,
            denormalise=options["revin"],
        ),
        n_channels=channels,
        n_time=_length(n_time, embed, n_pos),
        n_ctx=n_pos,
        positions="learned",
        act_fn=options["act_fn"],
        norm_position="post",
        normalization_type="BN",
        attn_scale=1 / scale if options["stored_scale"] else None,
        residual_attention=options["res_attention"],
        class_names=class_names,
    )
    model = HookedTST(cfg).to(device=positions.device, dtype=positions.dtype)
    weights = {
        "W_E": entries[f"{at}backbone.W_P.weight"].T,
        "b_E": entries[f"{at}backbone.W_P.bias"],
    }
    if affine and options["revin"]:
        weights["w"] = entries[f"{at}revin_layer.affine_weight"]
        weights["b"] = entries[f"{at}revin_layer.affine_bias"]
    fill(model.embed, weights)
    fill(model.pos_embed, {"W_pos": positions.expand(-1, d_model)})
    for layer, block in enumerate(model.blocks):
        fill_layer(block, entries, f"{stack}{layer}.", BACKBONE_LAYER, n_heads)
    _fill_head(model, [linear(entries, name) for name in maps], n_pos, individual)
    return model


def _fill_head(
    model: HookedTST, maps: list[tuple[Tensor, Tensor | None]], n_pos: int, individual: bool
) -> None:
    weights = [flatten_by_pos(weight, n_pos) for weight, _ in maps]
    biases = [bias for _, bias in maps if bias is not None]
    if individual:
        fill(model.head, {"W_U": torch.stack(weights), "b_U": torch.stack(biases)})
    else:
        fill(model.head, {"W_U": weights[0], "b_U": biases[0]})


def _channels(
    entries: Entries, options: dict[str, Any], at: str, affine: bool, individual: bool
) -> int:
    if affine:
        return len(entries[f"{at}revin_layer.affine_weight"])
    if individual:
        return entries.n_layers(f"{at}head.linears.")
    if options["n_channels"] is None:
        raise ArgumentError(
            "this PatchTST has no weights of its own for any channel, so its state dict does not "
            "tell how many there are; give n_channels= (1 for neuralforecast)"
        )
    return options["n_channels"]


def _embed(
    weight: Tensor, options: dict[str, Any], affine: bool, affine_eps: float, bias: bool = True
) -> RevINPatchesConfig:
    return RevINPatchesConfig(
        patch_len=weight.shape[1],
        stride=options["stride"],
        pad_end=options["stride"] if options["padding_patch"] == "end" else 0,
        scaling="sqrt_var_plus_eps" if options["revin"] else "none",
        location="last" if options["subtract_last"] else "mean",
        affine=affine and options["revin"],
        affine_eps=affine_eps,
        bias=bias,
    )


def _length(n_time: int | None, embed: RevINPatchesConfig, n_pos: int) -> int | None:
    if n_time is not None and embed.n_pos(n_time) != n_pos:
        raise StateDictError(
            f"{n_time} samples make {embed.n_pos(n_time)} patches of {embed.patch_len} every "
            f"{embed.stride}, and the model has {n_pos}; give the n_time= and stride= that it was "
            "trained with"
        )
    return n_time


def library(
    entries: Entries,
    options: dict[str, Any],
    n_time: int | None,
    class_names: tuple[str, ...] | None,
) -> HookedTST:
    """The hooked model of Time-Series-Library\'s PatchTST.

    Args:
        entries: the state dict.
        options: what it does not tell; ``n_heads`` is filled in.
        n_time: samples of a series, or None.
        class_names: one name per logit.
    """
    patch = entries["patch_embedding.value_embedding.weight"]
    d_model = len(patch)
    embed = _embed(patch, options, False, 0.0, bias=False)
    classifies = "projection.weight" in entries
    name = "projection" if classifies else "head.linear"
    n_out, width = entries[f"{name}.weight"].shape
    channels = options["n_channels"]
    if channels is None:
        raise ArgumentError(
            "TSLib's PatchTST has no weights of its own for any channel; give n_channels="
        )
    side_by_side = channels if classifies else 1
    if width % (d_model * side_by_side):
        raise StateDictError(
            f"this state dict does not fit family {NAME!r}: {name}.weight reads {width} numbers, "
            f"which do not divide into patches of d_model={d_model}"
            + (f" for n_channels={channels}" if classifies else "")
        )
    n_pos = width // (d_model * side_by_side)
    options["n_heads"] = options["n_heads"] or 8
    options["res_attention"] = False
    head: Any = HeadConfig("flatten", n_classes=n_out)
    if not classifies:
        head = FlatHeadConfig(horizon=n_out, denormalise=options["revin"])
    cfg = HookedTSTConfig(
        n_layers=entries.n_layers(STACK),
        d_model=d_model,
        n_heads=options["n_heads"],
        d_mlp=len(entries[f"{STACK}0.conv1.weight"]),
        embed=embed,
        head=head,
        n_channels=channels,
        n_time=_length(n_time, embed, n_pos),
        n_ctx=n_pos,
        positions="sinusoidal",
        act_fn=options["act_fn"],
        norm_position="post",
        final_norm=True,
        final_normalization_type="BN",
        eps=EPS,
        class_names=class_names,
    )
    model = HookedTST(cfg).to(device=patch.device, dtype=patch.dtype)
    fill(model.embed, {"W_E": patch.T})
    fill(
        model.pos_embed,
        {"W_pos": entries["patch_embedding.position_embedding.pe"][0, :n_pos]},
    )
    fill_trunk(model, entries, "encoder.norm.1")
    weight, bias = linear(entries, name)
    weights = {"W_U": flatten_by_pos(weight, n_pos, side_by_side)}
    fill(model.head, weights | ({} if bias is None else {"b_U": bias}))
    return model
