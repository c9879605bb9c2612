"""One hidden layer with a linear map beside it: how Chronos-Bolt embeds patches and reads out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.model.mlp import ACTIVATIONS
from tstlens.model.parts import ActFn


class ResidualMLP(nn.Module):
    """``act(x W_in + b_in) W_out + b_out + x W_skip + b_skip`` along the last axis.

    Args:
        d_in: width that goes in.
        d_hidden: hidden units.
        d_out: width that comes out.
        act_fn: the activation.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, act_fn: ActFn) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(d_in, d_hidden))
        self.b_in = nn.Parameter(torch.zeros(d_hidden))
        self.W_out = nn.Parameter(torch.zeros(d_hidden, d_out))
        self.b_out = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))
        self.b_skip = nn.Parameter(torch.zeros(d_out))
        self.act = ACTIVATIONS[act_fn]
        self.hook_pre = HookPoint()  # [..., d_hidden]
        self.hook_post = HookPoint()  # [..., d_hidden]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])

        def shaped(y: Tensor) -> Tensor:
            return y.view(*x.shape[:-1], y.shape[-1])

        pre = self.hook_pre(shaped(torch.addmm(self.b_in, flat, self.W_in)))
        post = self.hook_post(self.act(pre)).reshape(-1, len(self.W_out))
        hidden = torch.addmm(self.b_out, post, self.W_out)
        return shaped(hidden + torch.addmm(self.b_skip, flat, self.W_skip))
