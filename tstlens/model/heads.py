"""Heads: from the residual stream [row, pos, d_model] to class logits or a forecast.

The loss of a model's output: what ``return_type="loss"`` gives.
"""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.model.config import HookedTSTConfig
from tstlens.model.embed import brought_module, reject_module
from tstlens.model.parts import CustomConfig, FamilyPart, HeadConfig, Pooling
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Labels, Output, PosMask, Residual


class LinearHead(nn.Module):
    """Pool over positions, then ``pooled W_U + b_U``.

    A classifier gives [batch, class]; where channels are independent their pooled vectors stand
    side by side first (channel-major). A forecaster gives [batch, channel, horizon].
    """

    def __init__(self, cfg: HookedTSTConfig, head: HeadConfig) -> None:
        super().__init__()
        self.cfg = head
        self.n_ctx = cfg.n_ctx
        self.n_channels = cfg.n_channels or 1
        self.channel_independent = cfg.channel_independent
        d_in = cfg.d_model * ((cfg.n_ctx or 1) if head.pooling == "flatten" else 1)
        d_out = head.n_classes or head.horizon or 0
        if head.n_classes is not None and cfg.channel_independent:
            d_in *= self.n_channels
        if head.horizon is not None and not cfg.channel_independent:
            d_out *= self.n_channels
        self.W_U = nn.Parameter(torch.zeros(d_in, d_out))
        self.b_U = nn.Parameter(torch.zeros(d_out), requires_grad=head.bias)
        self.hook_pooled = Hook("row pooled")  # d_model, or pos * d_model when flat

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        if self.cfg.pooling == "flatten" and residual.shape[1] != self.n_ctx:
            raise SeriesShapeError(
                f"a flatten head takes exactly {self.n_ctx} positions, got {residual.shape[1]}"
            )
        pooled = self.hook_pooled(pool(residual, self.cfg.pooling, state.pos_mask))
        if self.cfg.horizon is not None:
            forecast = pooled @ self.W_U + self.b_U
            n_series = forecast.numel() // (self.n_channels * self.cfg.horizon)
            return forecast.view(n_series, self.n_channels, self.cfg.horizon)
        if self.channel_independent:
            pooled = pooled.reshape(len(pooled) // self.n_channels, len(self.W_U))
        return pooled @ self.W_U + self.b_U


class CustomHead(nn.Module):
    """A head of the user's own: any module from [batch, pos, d_model] to an output.

    It is called with ``mask=`` [batch, pos] as well where its ``forward`` takes one.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.takes_mask = "mask" in inspect.signature(module.forward).parameters

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        if self.takes_mask and state.pos_mask is not None:
            return self.module(residual, mask=state.pos_mask)
        return self.module(residual)


def pool(residual: Residual, pooling: Pooling, mask: PosMask | None) -> Float[Tensor, "row pooled"]:
    """One vector per row; padded positions take no part (they are zero where flattened)."""
    if pooling == "flatten":
        if mask is not None:
            residual = residual * mask[:, :, None]
        return residual.flatten(1)
    if pooling == "first":
        return residual[:, 0]
    if mask is None:
        if pooling == "max":
            return residual.amax(1)
        return residual.mean(1) if pooling == "mean" else residual[:, -1]
    if pooling == "max":
        return residual.masked_fill(~mask[:, :, None], float("-inf")).amax(1)
    if pooling == "mean":
        return (residual * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return residual[torch.arange(len(last), device=last.device), last]


def make_head(cfg: HookedTSTConfig, module: nn.Module | None) -> nn.Module:
    """The head that the config asks for; a custom one is the module the user brings."""
    if isinstance(cfg.head, CustomConfig):
        return CustomHead(brought_module("head", cfg.head, module))
    reject_module("head", module)
    if isinstance(cfg.head, FamilyPart):
        return cfg.head.build(cfg)
    return LinearHead(cfg, cfg.head)


def loss_of(n_classes: int | None, output: Tensor, target: Tensor | None) -> Tensor:
    """Mean cross-entropy (nats) of a classifier, mean squared error of a forecaster."""
    if target is None:
        raise ArgumentError("return_type='loss' needs target=: labels or true values")
    for name, given in (("output", output), ("target", target)):
        if not isinstance(given, Tensor):
            raise LabelError(
                f"expected {name} as a tensor, got {type(given).__name__}; "
                f"try torch.as_tensor({name})"
            )
    if target.is_floating_point() and n_classes is None:
        if target.shape != output.shape:
            raise SeriesShapeError(
                f"expected a target like the output {list(output.shape)}, got {list(target.shape)}"
            )
        return nn.functional.mse_loss(output, target)
    if target.is_floating_point() or output.ndim != 2:
        kind = "integer labels [batch]" if output.ndim == 2 else "a float target"
        raise LabelError(
            f"expected {kind} for an output {list(output.shape)}, "
            f"got {target.dtype} {list(target.shape)}"
        )
    check_labels(target, len(output), output.shape[1])
    return nn.functional.cross_entropy(output, target.long())


def check_labels(labels: Labels, n: int, n_classes: int) -> None:
    """Raise :class:`LabelError` unless labels are [n] within 0..n_classes-1."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise LabelError(f"expected integer labels as a tensor [{n}], got {got}")
    if labels.ndim != 1 or len(labels) != n:
        raise LabelError(f"expected one label per series [{n}], got {list(labels.shape)}")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        bad = labels[(labels < 0) | (labels >= n_classes)][0]
        raise LabelError(f"expected labels in 0..{n_classes - 1}, got {int(bad)}")
