"""Layer norm and RMS norm with TransformerLens' hook points.

``hook_scale`` holds what the centred input is divided by, ``hook_normalized`` the quotient before
weight and bias, as in TransformerLens. With nobody listening torch's fused kernel runs instead.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.model.config import HookedTSTConfig


def listened_to(*points: nn.Module) -> bool:
    """Whether any hook of any kind sits on one of these points, or a dictionary is spliced in."""
    return any(
        "intercepts" in point.__dict__
        or point._forward_hooks
        or point._backward_hooks
        or point._forward_pre_hooks
        or point._backward_pre_hooks
        for point in points
    )


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * w + b`` over the last axis."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))
        self.hook_scale = HookPoint()  # [row, pos, 1]
        self.hook_normalized = HookPoint()  # [row, pos, d_model]

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if not listened_to(self.hook_scale, self.hook_normalized):
            return nn.functional.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(x / scale) * self.w + self.b


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * w`` over the last axis."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d_model))
        self.hook_scale = HookPoint()  # [row, pos, 1]
        self.hook_normalized = HookPoint()  # [row, pos, d_model]

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if not listened_to(self.hook_scale, self.hook_normalized):
            return nn.functional.rms_norm(x, self.w.shape, self.w, self.eps)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(x / scale) * self.w


def make_norm(cfg: HookedTSTConfig) -> LayerNorm | RMSNorm:
    """The norm that the config asks for."""
    kind = LayerNorm if cfg.normalization_type == "LN" else RMSNorm
    return kind(cfg.d_model, cfg.eps)
