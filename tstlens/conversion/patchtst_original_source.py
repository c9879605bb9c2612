"""The original PatchTSTs as their weights compute them, how live ones run, and their taps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tstlens.conversion.comparing import Tap
from tstlens.conversion.named_layers import LayerNames, Restated, class_path
from tstlens.conversion.tsl_layers import RestatedTsl, layer_taps, pattern_taps
from tstlens.model import HookedTST

NEURALFORECAST = "neuralforecast.models.patchtst.PatchTST"
LIBRARY = "models.PatchTST.Model"  # the authors' repository has a class of this name too
AUTHORS = ("layers.PatchTST_backbone.PatchTST_backbone",)
BACKBONE_LAYER = LayerNames(
    q="self_attn.W_Q",
    k="self_attn.W_K",
    v="self_attn.W_V",
    o="self_attn.to_out.0",
    norm1="norm_attn.1",
    mlp_in="ff.0",
    mlp_out="ff.3",
    norm2="norm_ffn.1",
    scale="self_attn.sdp_attn.scale",
)


class RestatedBackbone(Restated):
    """``PatchTST_backbone`` in eval mode, from a state dict; series [batch, channel, time].

    Args:
        state: names and tensors.
        options: what it does not tell.
        cfg: of the hooked model; only the outputs per step are read.
    """

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any], cfg: Any) -> None:
        super().__init__(state)
        self.options = dict(options)
        self.at = "model." if "model.backbone.W_pos" in self else ""

    def forward(self, series: Tensor) -> Tensor:
        at, options = self.at, self.options
        x, last = series, options["subtract_last"]
        affine = f"{at}revin_layer.affine_weight" in self
        center = stdev = gain = shift = None
        if options["revin"]:
            center = x[:, :, -1:] if last else x.mean(2, keepdim=True)
            stdev = (x.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
            x = (x - center) / stdev
            if affine:
                gain = self[f"{at}revin_layer.affine_weight"][:, None]
                shift = self[f"{at}revin_layer.affine_bias"][:, None]
                x = x * gain + shift
        stride = options["stride"]
        if options["padding_patch"] == "end":
            x = F.pad(x, (0, stride), mode="replicate")
        x = x.unfold(2, self[f"{at}backbone.W_P.weight"].shape[1], stride)
        n_channels = x.shape[1]
        x = self.linear(x, f"{at}backbone.W_P").flatten(0, 1) + self[f"{at}backbone.W_pos"]
        x = self.encode(
            x,
            f"{at}backbone.encoder.layers.",
            BACKBONE_LAYER,
            options["n_heads"],
            options["act_fn"],
            options["res_attention"],
        )
        x = x.transpose(1, 2).unflatten(0, (-1, n_channels)).flatten(2)  # [b, c, d_model * pos]
        if f"{at}head.linear.weight" in self:
            x = self.linear(x, f"{at}head.linear")
        else:
            own = [self.linear(x[:, c], f"{at}head.linears.{c}") for c in range(n_channels)]
            x = torch.stack(own, 1)
        if gain is not None and shift is not None:
            x = (x - shift) / (gain + 1e-5 * 1e-5)
        if center is not None and stdev is not None:
            x = x * stdev + center
        per_step = options["n_quantiles"]
        return x if per_step is None else x.unflatten(2, (-1, per_step))


class RestatedLibrary(RestatedTsl):
    """Time-Series-Library's PatchTST in eval mode, from a state dict.

    Args:
        state: names and tensors.
        options: what it does not tell.
        cfg: of the hooked model; not read.
    """

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any], cfg: Any) -> None:
        super().__init__(state, options["n_heads"], options["act_fn"])
        self.stride, self.padded = options["stride"], options["padding_patch"] == "end"
        self.revin, self.last = options["revin"], options["subtract_last"]

    def forward(self, series: Tensor) -> Tensor:
        x, means, stdev = self.scaled(series) if self.revin else (series, None, None)
        if self.last and means is not None and stdev is not None:
            means = series[:, :, -1:]
            x = (series - means) / stdev
        x = F.pad(x, (0, self.stride), mode="replicate") if self.padded else x
        x = x.unfold(2, self["patch_embedding.value_embedding.weight"].shape[1], self.stride)
        n_channels = x.shape[1]
        x = self.linear(x, "patch_embedding.value_embedding").flatten(0, 1)
        x = x + self["patch_embedding.position_embedding.pe"][:, : x.shape[1]]
        x = self.encoded(x, "encoder.norm.1").transpose(1, 2)
        x = x.unflatten(0, (-1, n_channels)).flatten(2)  # [b, c, d_model * pos]
        if "projection.weight" in self:
            return self.linear(x.flatten(1), "projection")
        x = self.linear(x, "head.linear")
        return x if means is None or stdev is None else x * stdev + means


def run(source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's output on [batch, channel, time], in our layout."""
    series = series.clone()  # sources divide in place
    if isinstance(source, RestatedBackbone | RestatedLibrary):
        return source(series)
    path = class_path(source)
    if path in AUTHORS:
        return source(series)
    by_time = series.transpose(1, 2)
    if path == NEURALFORECAST:
        out = source({"insample_y": by_time})  # [batch, horizon, output], one channel
        one = source.loss.outputsize_multiplier == 1
        return out.transpose(1, 2) if one else out[:, None]
    out = source(by_time) if hasattr(source, "model") else source(by_time, None, None, None)
    return out.transpose(1, 2) if out.ndim == 3 else out


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a live PatchTST computes our activations."""
    if class_path(source) == LIBRARY and hasattr(source, "patch_embedding"):
        return _library_taps(source, model)
    inner = "" if class_path(source) in AUTHORS else "model."

    def rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    found = [Tap("hook_embed", f"{inner}backbone.W_P", rows)]
    if "embed.hook_scaled" in model.hook_dict:
        found.append(Tap("embed.hook_scaled", f"{inner}revin_layer", lambda x: x.transpose(1, 2)))
        found.append(Tap("head.hook_scaled", f"{inner}head", rows))
    for layer in range(model.cfg.n_layers):
        ours, theirs = f"blocks.{layer}.", f"{inner}backbone.encoder.layers.{layer}"
        found += [
            Tap(f"{ours}hook_attn_out", f"{theirs}.self_attn", lambda out: out[0]),
            Tap(f"{ours}mlp.hook_pre", f"{theirs}.ff.0"),
            Tap(f"{ours}hook_mlp_out", f"{theirs}.ff"),
            Tap(
                f"{ours}hook_normalized_resid_post",
                theirs,
                lambda out: out[0] if isinstance(out, tuple) else out,
            ),
        ]
        if model.cfg.residual_attention:  # neuralforecast gives no pattern without
            found.append(Tap(f"{ours}attn.hook_pattern", f"{theirs}.self_attn", lambda out: out[1]))
    return found


def _library_taps(source: Any, model: HookedTST) -> list[Tap]:
    found = [
        Tap("hook_embed", "patch_embedding.value_embedding"),
        *layer_taps(model.cfg.n_layers),
        *pattern_taps(source, model.cfg.n_layers),
    ]
    if model.cfg.horizon is not None:
        found.append(Tap("head.hook_scaled", "head", lambda x: x.flatten(0, 1)))
    return found
