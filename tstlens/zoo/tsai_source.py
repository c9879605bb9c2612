"""tsai's models as their weights compute them, and where they compute what.

``RestatedTsai`` stands in for the source where only a state dict was given: the arithmetic of
tsai 1.0.1 in eval mode, in plain PyTorch, sharing nothing with the hooked model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import einops
import torch
from torch import Tensor
from torch.nn import functional as F

from tstlens.model import HookedTST
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import ACT, LayerTable, Restated, first, second
from tstlens.zoo.patchtst_original import BACKBONE_LAYER

_ROWS = {
    "attn.Q": "self_attn.W_Q",
    "attn.K": "self_attn.W_K",
    "attn.V": "self_attn.W_V",
    "mlp.in": "ff.0",
    "mlp.out": "ff.3",
}
LAYERS = {
    "TST": LayerTable(
        _ROWS | {"attn.O": "self_attn.W_O", "ln1": "batchnorm_attn.1", "ln2": "batchnorm_ffn.1"},
    ),
    "TSTPlus": BACKBONE_LAYER,
    "PatchTST": BACKBONE_LAYER,
}


def layer_names(kind: str, weights: Any, first: str) -> LayerTable:
    """What the parts of a layer are called; layer norms stand by themselves.

    Args:
        kind: of the model.
        weights: its entries.
        first: prefix of the first layer, with the last dot.
    """
    if f"{first}norm_attn.weight" in weights:
        plain = {"ln1": "norm_attn", "ln2": "norm_ffn"}
        return dataclasses.replace(LAYERS[kind], rows={**LAYERS[kind].rows, **plain})
    return LAYERS[kind]


class RestatedTsai(Restated):
    """One of tsai's three models, from its state dict and what that does not tell.

    Args:
        state: names and tensors.
        options: kind, heads, activation and the rest.
        cfg: of the hooked model, for the front end's padding.
    """

    def __init__(self, state: Mapping[str, Tensor], options: Any, cfg: Any) -> None:
        super().__init__(state, options.eps)
        self.options, self.embed_cfg, self.n_heads = options, cfg.embed, cfg.n_heads
        self.residual, self.head_cfg = cfg.residual_attention, cfg.head

    def forward(self, given: Any) -> Tensor:
        if self.options.kind == "PatchTST":
            return self._patchtst(given)
        series, padded = given if isinstance(given, tuple) else self._missing(given)
        prefix = "" if self.options.kind == "TST" else "backbone."
        x = self._steps(series, prefix) + self[prefix + "W_pos"]
        keep = None if padded is None else ~padded
        x = self._encode(x, f"{prefix}encoder.layers.", keep).transpose(1, 2)
        if keep is not None:
            x = x * keep[:, None]
        return self._head(x)

    def _encode(self, x: Tensor, stack: str, keep: Tensor | None = None) -> Tensor:
        return self.encode(
            x,
            stack,
            layer_names(self.options.kind, self, f"{stack}0."),
            self.n_heads,
            self.options.act_fn,
            self.residual,
            keep,
            self.options.pre_norm,
        )

    def _missing(self, series: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.options.kind == "TST" or not self.options.takes_missing:
            return series, None
        missing = series.isnan()
        if not bool(missing.any()):
            return series, None
        return series.masked_fill(missing, 0.0), missing.float().mean(1) == 1

    def _steps(self, series: Tensor, prefix: str) -> Tensor:
        at = f"{prefix}W_P.1" if f"{prefix}W_P.1.weight" in self else f"{prefix}W_P"
        if self[f"{at}.weight"].ndim == 2:
            return self.linear(series.transpose(1, 2), at)
        part: Any = self.embed_cfg
        padded = F.pad(series, (part.pad_start, part.pad_end))
        bias = self.get(f"{at}.bias")
        conv = F.conv1d(padded, self[f"{at}.weight"], bias, part.stride, 0, part.dilation)
        return conv.transpose(1, 2)

    def _head(self, x: Tensor) -> Tensor:
        """From [batch, d_model, pos]: activation and flatten, or pooling; norm, map, range."""
        part: Any = self.head_cfg
        if part.pooling == "flatten":
            x = ACT[part.act_fn](x).flatten(1) if part.act_fn else x.flatten(1)
        elif part.pooling == "mean":
            x = x.mean(2)
        else:
            x = torch.cat([x.amax(2), x.mean(2)], 1)
        for name in self._places:
            if name.startswith("head.") and name.endswith(".running_mean"):
                x = self.norm(x, name.removesuffix(".running_mean"))
        maps = [n for n in self._places if n.startswith("head.") and self[n].ndim == 2]
        x = self.linear(x, maps[0].removesuffix(".weight"))
        limits = self.options.y_range
        if limits is not None:
            x = torch.sigmoid(x) * (limits[1] - limits[0]) + limits[0]
        return x

    def _patchtst(self, series: Tensor) -> Tensor:
        options, part = self.options, self.embed_cfg
        x, center, scale = series, None, None
        if options.revin:
            center = x[:, :, -1:] if options.subtract_last else x.mean(2, keepdim=True)
            scale = x.std(2, keepdim=True, unbiased=False) + options.revin_eps
            x = (x - center) / scale
            if options.affine:
                x = x * self["model.revin_layer.weight"] + self["model.revin_layer.bias"]
        x = F.pad(x, (part.pad_start, part.pad_end), mode="replicate")
        x = x.unfold(2, part.patch_len, part.stride)
        n_channels = x.shape[1]
        x = self.linear(x, "model.backbone.W_P").flatten(0, 1) + self["model.backbone.W_pos"]
        x = self._encode(x, "model.backbone.layers.")
        x = x.transpose(1, 2).unflatten(0, (-1, n_channels)).flatten(2)  # [b, c, d_model * pos]
        if "model.head.layer.1.weight" in self:
            x = self.linear(x, "model.head.layer.1")
        else:
            parts = [self.linear(x[:, c], f"model.head.layers.{c}.1") for c in range(n_channels)]
            x = torch.stack(parts, 1)
        if scale is None or center is None:
            return x
        if options.affine:
            x = (x - self["model.revin_layer.bias"]) / self["model.revin_layer.weight"]
        return x * scale + center


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a live tsai model computes our activations."""
    kind = type(source).__name__
    if kind not in LAYERS:
        return []
    prefix = {"TST": "", "TSTPlus": "backbone.", "PatchTST": "model.backbone."}[kind]
    found = [Tap("hook_embed", f"{prefix}W_P", _embedded(kind, model))]
    if kind == "PatchTST" and source.model.revin:
        found.append(Tap("embed.hook_scaled", "model.revin_layer"))
        found.append(Tap("head.hook_scaled", "model.head", lambda x: x.flatten(0, 1)))
    # Where norms come first, what ends our block is the first norm of the source's next layer.
    leaving = "hook_normalized_resid_post" if model.cfg.last_norm else "hook_resid_post"
    stack = f"{prefix}layers." if kind == "PatchTST" else f"{prefix}encoder.layers."
    for layer in range(model.cfg.n_layers):
        ours, theirs = f"blocks.{layer}", f"{stack}{layer}"
        shown = (Tap("attn.hook_pattern", "self_attn", second), Tap(leaving, "", first))
        table = dataclasses.replace(LAYERS[kind], taps=shown)
        found += table.find(model, ours, theirs)
    return found


def _embedded(kind: str, model: HookedTST) -> Any:
    if kind == "PatchTST":
        return lambda x: x.flatten(0, 1)
    if model.cfg.embed.kind == "conv-steps":
        return lambda x: einops.rearrange(x, "b d p -> b p d")
    return lambda x: x
