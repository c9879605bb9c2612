"""The MLP of a block, with a hook point before and after its activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tstlens.model.config import HookedTSTConfig
from tstlens.points import Hook
from tstlens.shapes import Hidden, Residual

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "silu": nn.functional.silu,
}


class MLP(nn.Module):
    """``act(x W_in + b_in) W_out + b_out`` at every position by itself.

    A gated one is ``(act(x W_gate) * (x W_in + b_in)) W_out + b_out``; its ``hook_pre`` holds
    ``x W_gate`` and its ``hook_pre_linear`` ``x W_in``, as in TransformerLens.
    """

    def __init__(self, cfg: HookedTSTConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp), requires_grad=cfg.mlp_bias)
        self.W_out = nn.Parameter(torch.zeros(cfg.d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model), requires_grad=cfg.mlp_bias)
        self.act = ACTIVATIONS[cfg.act_fn]
        self.gated = cfg.gated_mlp
        if self.gated:
            self.W_gate = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_mlp))
            self.hook_pre_linear = Hook("row pos d_mlp")
        self.hook_pre = Hook("row pos d_mlp")
        self.hook_post = Hook("row pos d_mlp")

    def forward(self, x: Residual) -> Residual:
        if self.gated:
            gate = self.act(self.hook_pre(x @ self.W_gate))
            return self.write(
                self.hook_post(gate * self.hook_pre_linear(_affine(x, self.W_in, self.b_in)))
            )
        pre = self.hook_pre(_affine(x, self.W_in, self.b_in))
        return self.write(self.hook_post(self.act(pre)))

    def write(self, post: Hidden) -> Residual:
        """What the hidden units add to the residual stream."""
        return _affine(post, self.W_out, self.b_out)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return flat.view(*x.shape[:-1], weight.shape[1])
