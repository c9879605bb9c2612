"""Layer norm, RMS norm and batch norm with TransformerLens' hook points.

``hook_scale`` holds what the centred input is divided by, ``hook_normalized`` the quotient before
weight and bias, as in TransformerLens. With nobody listening torch's fused kernel runs instead,
unless ``cfg.use_fused`` is False.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tstlens.model.config import HookedTSTConfig
from tstlens.points import Hook


def watched(*points: nn.Module) -> bool:
    """Whether these points have to fire: somebody listens, or the model is set not to fuse."""
    cfg = points[0].__dict__.get("cfg_of_model")  # see HookedTST.__init__
    anywhere = bool(_has_any_global_hook())  # on every module of every model
    return anywhere or not getattr(cfg, "use_fused", True) or listened_to(*points)


def listened_to(*points: nn.Module) -> bool:
    """Whether somebody reads one of these points, or may: other libraries wrap every module."""
    return any("forward" in point.__dict__ for point in points) or hooked(*points)


def hooked(*points: nn.Module) -> bool:
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
        self.hook_scale = Hook("row pos 1")
        self.hook_normalized = Hook("row pos d_model")

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if not watched(self.hook_scale, self.hook_normalized):
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
        self.hook_scale = Hook("row pos 1")
        self.hook_normalized = Hook("row pos d_model")

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if not watched(self.hook_scale, self.hook_normalized):
            return nn.functional.rms_norm(x, self.w.shape, self.w, self.eps)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(x / scale) * self.w


class BatchNorm(nn.Module):
    """``(x - running_mean) / sqrt(running_var + eps) * w + b``: a fixed map of every dimension.

    The statistics are the source's and stay as they are, in training mode too.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))
        self.hook_scale = Hook("row pos d_model")
        self.hook_normalized = Hook("row pos d_model")

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        scale = (self.running_var + self.eps).sqrt()
        if not watched(self.hook_scale, self.hook_normalized):
            gain = self.w / scale
            return torch.addcmul(self.b - self.running_mean * gain, x, gain)
        scale = self.hook_scale(scale.expand_as(x).clone())
        return self.hook_normalized((x - self.running_mean) / scale) * self.w + self.b


class NoNorm(nn.Module):
    """What stands in a norm's place where there is none: the input itself, divided by one."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_scale = Hook("row pos 1")
        self.hook_normalized = Hook("row pos d_model")

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if not watched(self.hook_scale, self.hook_normalized):
            return x
        return self.hook_normalized(x / self.hook_scale(torch.ones_like(x[..., :1])))


@dataclass(frozen=True)
class HeldNorm:
    """A norm as the affine map it was in one run, its scale held at what it was.

    ``norm(x) = through(x) + bias`` and ``hook_normalized = divide(x) + shift``: ``divide`` and
    ``through`` are linear, so they may be applied to the parts of a sum one by one.

    Args:
        norm: the model's.
        scale: its ``hook_scale`` in the run, [..., pos, 1 or d_model].
    """

    norm: Any
    scale: Tensor

    def divide(self, x: Tensor) -> Tensor:
        """A part of the input, centred where the norm centres, over the scale."""
        return self._centre(x) / self.scale

    def through(self, x: Tensor) -> Tensor:
        """A part of the input as it leaves the norm, without the norm's bias."""
        return self.divide(x) * self.norm.w

    def read(self, direction: Tensor, gain: bool = True) -> Tensor:
        """The direction in the input that ``through`` (``divide`` without ``gain``) turns so."""
        return self._centre((direction * self.norm.w if gain else direction) / self.scale)

    @property
    def shift(self) -> Tensor | None:
        """What ``hook_normalized`` holds of a zero input; None where that is zero."""
        mean = getattr(self.norm, "running_mean", None)
        return None if mean is None else -mean / self.scale

    @property
    def bias(self) -> Tensor | None:
        """What leaves the norm of a zero input; None where that is zero."""
        bias, shift = getattr(self.norm, "b", None), self.shift
        return bias if shift is None else bias + shift * self.norm.w

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if isinstance(self.norm, LayerNorm) else x


_NORMS = {"LN": LayerNorm, "RMS": RMSNorm, "BN": BatchNorm}


def make_norm(
    cfg: HookedTSTConfig, of_mlp: bool = False, final: bool = False
) -> LayerNorm | RMSNorm | BatchNorm:
    """The norm that the config asks for.

    Args:
        cfg: the model's.
        of_mlp: whether the norm belongs to an MLP, which may have a kind of its own.
        final: whether it stands after the last block, where it may have a kind of its own.
    """
    own = cfg.mlp_normalization_type if of_mlp else cfg.final_normalization_type if final else None
    return _NORMS[own or cfg.normalization_type](cfg.d_model, cfg.eps)
