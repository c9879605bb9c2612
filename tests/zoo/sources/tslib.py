"""PatchTST and iTransformer of Time-Series-Library, restated: it has no package.

Modules are named as in its state dicts; the classes carry its names, because conversion recognises
a source by its name. ``config`` is a ``SimpleNamespace`` there, keywords here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Swap(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class FullAttention(nn.Module):
    def __init__(self, output_attention: bool) -> None:
        super().__init__()
        self.output_attention = output_attention

    def forward(self, q: Any, k: Any, v: Any) -> tuple[torch.Tensor, Any]:
        scores = torch.einsum("blhe,bshe->bhls", q, k) * q.shape[-1] ** -0.5
        pattern = scores.softmax(-1)
        mixed = torch.einsum("bhls,bshd->blhd", pattern, v).contiguous()
        return mixed, pattern if self.output_attention else None


class AttentionLayer(nn.Module):
    def __init__(self, d_model: int, n_heads: int, output_attention: bool) -> None:
        super().__init__()
        self.inner_attention = FullAttention(output_attention)
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.n_heads = n_heads

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        q, k, v = (
            f(x).unflatten(2, (self.n_heads, -1))
            for f in (self.query_projection, self.key_projection, self.value_projection)
        )
        mixed, pattern = self.inner_attention(q, k, v)
        return self.out_projection(mixed.flatten(2)), pattern


class EncoderLayer(nn.Module):
    def __init__(
        self, d_model: int, n_heads: int, d_ff: int, activation: str, output_attention: bool
    ) -> None:
        super().__init__()
        self.attention = AttentionLayer(d_model, n_heads, output_attention)
        self.conv1, self.conv2 = nn.Conv1d(d_model, d_ff, 1), nn.Conv1d(d_ff, d_model, 1)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.activation = F.relu if activation == "relu" else F.gelu

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        mixed, pattern = self.attention(x)
        x = self.norm1(x + mixed)
        hidden = self.conv2(self.activation(self.conv1(x.transpose(1, 2)))).transpose(1, 2)
        return self.norm2(x + hidden), pattern


class Encoder(nn.Module):
    def __init__(self, layers: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.attn_layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.attn_layers:
            x, _ = layer(x)
        return self.norm(x)


class PositionalEmbedding(nn.Module):
    pe: torch.Tensor

    def __init__(self, d_model: int, max_len: int = 200) -> None:
        super().__init__()
        steps = torch.arange(max_len).float()
        rates = 10000.0 ** (-torch.arange(0, d_model, 2).float() / d_model)
        angles = torch.outer(steps, rates)
        table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        self.register_buffer("pe", table[None])


class PatchEmbedding(nn.Module):
    def __init__(self, d_model: int, patch_len: int, stride: int) -> None:
        super().__init__()
        self.patch_len, self.stride = patch_len, stride
        self.value_embedding = nn.Linear(patch_len, d_model, bias=False)
        self.position_embedding = PositionalEmbedding(d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, x[:, :, -1:].repeat(1, 1, self.stride)], 2)
        starts = range(0, x.shape[2] - self.patch_len + 1, self.stride)
        patches = torch.stack([x[:, :, s : s + self.patch_len] for s in starts], 2).flatten(0, 1)
        return self.value_embedding(patches) + self.position_embedding.pe[:, : patches.shape[1]]


class FlattenHead(nn.Module):
    def __init__(self, n_vars: int, width: int, out: int) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.linear = nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(-2))


def layers_of(o: dict[str, Any]) -> list[nn.Module]:
    return [
        EncoderLayer(o["d_model"], o["n_heads"], o["d_ff"], o["activation"], o["output_attention"])
        for _ in range(o["e_layers"])
    ]


DEFAULTS: dict[str, Any] = {
    "d_model": 16, "n_heads": 4, "d_ff": 24, "e_layers": 2, "activation": "gelu",
    "output_attention": True, "task_name": "long_term_forecast",
}  # fmt: skip


def normalised(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    means = x.mean(1, keepdim=True)
    x = x - means
    stdev = torch.sqrt(torch.var(x, dim=1, keepdim=True, unbiased=False) + 1e-5)
    x /= stdev
    return x, means, stdev


class PatchTST(nn.Module):
    def __init__(
        self, seq_len: int, pred_len: int, enc_in: int, patch_len: int = 8, stride: int = 4,
        num_class: int = 5, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        o = DEFAULTS | options
        self.task_name, self.pred_len = o["task_name"], pred_len
        self.patch_embedding = PatchEmbedding(o["d_model"], patch_len, stride)
        norm = nn.Sequential(Swap(), nn.BatchNorm1d(o["d_model"]), Swap())
        self.encoder = Encoder(layers_of(o), norm)
        width = o["d_model"] * int((seq_len - patch_len) / stride + 2)
        if self.task_name == "classification":
            self.projection = nn.Linear(width * enc_in, num_class)
        else:
            self.head = FlattenHead(enc_in, width, pred_len)

    def forward(self, x_enc: Any, x_mark: Any, x_dec: Any, y_mark: Any) -> torch.Tensor:
        x, means, stdev = normalised(x_enc)
        n_vars = x.shape[2]
        x = self.encoder(self.patch_embedding(x.permute(0, 2, 1)))
        x = x.unflatten(0, (-1, n_vars)).permute(0, 1, 3, 2)  # [batch, channel, d_model, pos]
        if self.task_name == "classification":
            return self.projection(x.flatten(1))
        return self.head(x).permute(0, 2, 1) * stdev + means


class InvertedEmbedding(nn.Module):
    def __init__(self, seq_len: int, d_model: int) -> None:
        super().__init__()
        self.value_embedding = nn.Linear(seq_len, d_model)

    def forward(self, x: torch.Tensor, marks: Any) -> torch.Tensor:
        tokens = x if marks is None else torch.cat([x, marks], 2)
        return self.value_embedding(tokens.permute(0, 2, 1))


class ITransformer(nn.Module):
    def __init__(
        self, seq_len: int, pred_len: int, enc_in: int, num_class: int = 5, use_norm: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        o = DEFAULTS | options
        self.task_name, self.use_norm = o["task_name"], use_norm
        self.enc_embedding = InvertedEmbedding(seq_len, o["d_model"])
        self.encoder = Encoder(layers_of(o), nn.LayerNorm(o["d_model"]))
        classifies = self.task_name == "classification"
        sizes = (o["d_model"] * enc_in, num_class) if classifies else (o["d_model"], pred_len)
        self.projection = nn.Linear(*sizes)

    def forward(self, x_enc: Any, x_mark: Any, x_dec: Any, y_mark: Any) -> torch.Tensor:
        if self.task_name == "classification":
            x = F.gelu(self.encoder(self.enc_embedding(x_enc, None)))
            return self.projection(x.flatten(1))
        x, means, stdev = normalised(x_enc) if self.use_norm else (x_enc, 0.0, 1.0)
        n_vars = x.shape[2]
        x = self.projection(self.encoder(self.enc_embedding(x, x_mark)))
        return x.permute(0, 2, 1)[:, :, :n_vars] * stdev + means


PatchTST.__module__, ITransformer.__module__ = "models.PatchTST", "models.iTransformer"
PatchTST.__qualname__ = ITransformer.__qualname__ = "Model"
