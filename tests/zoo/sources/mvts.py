"""mvts_transformer's two models, restated with the names of its modules: it has no package.

The layer with batch norm takes no ``is_causal``, as in the repository's first versions, so calling
the whole model fails on current torch; ``by_layers`` is what the repository computed then.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Positions(nn.Module):
    pe: torch.Tensor

    def __init__(self, max_len: int, d_model: int, learnable: bool) -> None:
        super().__init__()
        if learnable:
            self.pe = nn.Parameter(torch.rand(max_len, 1, d_model) - 0.5)
            return
        steps = torch.arange(max_len, dtype=torch.float)
        rates = torch.exp(-math.log(10000.0) / d_model * torch.arange(0, d_model, 2).float())
        angles = torch.outer(steps, rates)
        table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        self.register_buffer("pe", table[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pe[: len(x)]


class BatchNormLayer(nn.Module):
    def __init__(self, d_model: int, n_heads: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, n_heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2 = nn.BatchNorm1d(d_model), nn.BatchNorm1d(d_model)
        self.activation = getattr(F, activation)

    def forward(self, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None) -> Any:
        mixed, _ = self.self_attn(src, src, src, key_padding_mask=src_key_padding_mask)
        src = self.norm1((src + mixed).permute(1, 2, 0)).permute(2, 0, 1)
        hidden = self.linear2(self.activation(self.linear1(src)))
        return self.norm2((src + hidden).permute(1, 2, 0)).permute(2, 0, 1)


class TSTransformerEncoder(nn.Module):
    flattens = False

    def __init__(
        self, feat_dim: int, max_len: int, d_model: int, n_heads: int, num_layers: int,
        dim_feedforward: int, num_classes: int = 5, pos_encoding: str = "fixed",
        activation: str = "gelu", norm: str = "BatchNorm",
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.project_inp = nn.Linear(feat_dim, d_model)
        self.pos_enc = Positions(max_len, d_model, pos_encoding == "learnable")
        if norm == "LayerNorm":
            layer: Any = nn.TransformerEncoderLayer(
                d_model, n_heads, dim_feedforward, activation=activation
            )
        else:
            layer = BatchNormLayer(d_model, n_heads, dim_feedforward, activation)
        self.transformer_encoder = nn.TransformerEncoder(
            layer, num_layers, enable_nested_tensor=False
        )
        self.act = getattr(F, activation)
        out = (d_model * max_len, num_classes) if self.flattens else (d_model, feat_dim)
        self.output_layer = nn.Linear(*out)

    def by_layers(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        x = self.pos_enc(self.project_inp(x.permute(1, 0, 2)) * self.d_model**0.5)
        for layer in self.transformer_encoder.layers:
            x = layer(x, src_key_padding_mask=~keep)
        x = self.act(x).permute(1, 0, 2)
        if self.flattens:
            x = (x * keep.unsqueeze(-1)).reshape(len(x), -1)
        return self.output_layer(x)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        x = self.pos_enc(self.project_inp(x.permute(1, 0, 2)) * self.d_model**0.5)
        x = self.act(self.transformer_encoder(x, src_key_padding_mask=~keep)).permute(1, 0, 2)
        if self.flattens:
            x = (x * keep.unsqueeze(-1)).reshape(len(x), -1)
        return self.output_layer(x)


class TSTransformerEncoderClassiregressor(TSTransformerEncoder):
    flattens = True


for made in (TSTransformerEncoder, TSTransformerEncoderClassiregressor):
    made.__module__ = "models.ts_transformer"
