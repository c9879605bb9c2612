"""TST, TSTPlus and PatchTST of tsai 1.0.1, restated: for where tsai cannot be installed.

The classes carry the names of tsai's, because conversion recognises a source by its name; modules
and parameters are called as in tsai's state dicts. ``test_tsai.py`` compares these with tsai
itself where that is there.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Swap(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class Flatten(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)


class GAP1d(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(-1)


class GACP1d(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.max(-1).values, x.mean(-1)], 1)


class SigmoidRange(nn.Module):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid() * (self.high - self.low) + self.low


class Pad1d(nn.ConstantPad1d):
    def __init__(self, padding: tuple[int, int]) -> None:
        super().__init__(padding, 0.0)


def norm_over(d_model: int, kind: str) -> nn.Module:
    if kind == "BatchNorm":
        return nn.Sequential(Swap(), nn.BatchNorm1d(d_model), Swap())
    return nn.LayerNorm(d_model)


class Scale(nn.Module):
    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(d_head**-0.5), requires_grad=False)


class SelfAttention(nn.Module):
    """``plus`` has biases, a stored scale, hands scores on; plain TST has none of these."""

    def __init__(self, plus: bool, d_model: int, n_heads: int, d_k: Any, residual: bool) -> None:
        super().__init__()
        self.n_heads, self.plus, self.res_attention = n_heads, plus, residual
        width = n_heads * (d_k or d_model // n_heads)
        self.W_Q = nn.Linear(d_model, width, bias=plus)
        self.W_K = nn.Linear(d_model, width, bias=plus)
        self.W_V = nn.Linear(d_model, width, bias=plus)
        if plus:
            self.sdp_attn = Scale(d_model // n_heads)
            self.to_out = nn.Sequential(nn.Linear(width, d_model), nn.Dropout(0.1))
        else:
            self.W_O = nn.Linear(width, d_model, bias=False)

    def forward(self, x: torch.Tensor, before: Any, padded: Any) -> tuple[torch.Tensor, ...]:
        rows, pos, _ = x.shape
        q, k, v = (
            f(x).reshape(rows, pos, self.n_heads, -1).permute(0, 2, 1, 3)
            for f in (self.W_Q, self.W_K, self.W_V)
        )
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        scores = scores * self.sdp_attn.scale if self.plus else scores / math.sqrt(q.shape[-1])
        if self.res_attention and before is not None:
            scores = scores + before
        if padded is not None:
            scores = scores.masked_fill(padded[:, None, None, :], -torch.inf)
        pattern = torch.softmax(scores, -1)
        mixed = torch.einsum("bhqk,bhkd->bqhd", pattern, v).reshape(rows, pos, -1)
        out = self.to_out(mixed) if self.plus else self.W_O(mixed)
        return (out, pattern, scores) if self.res_attention else (out, pattern)


class Layer(nn.Module):
    def __init__(self, plus: bool, o: dict[str, Any]) -> None:
        super().__init__()
        self.pre_norm, self.plus = o["pre_norm"], plus
        self.residual = plus and o["res_attention"]
        self.self_attn = SelfAttention(plus, o["d_model"], o["n_heads"], o["d_k"], self.residual)
        self.ff = nn.Sequential(
            nn.Linear(o["d_model"], o["d_ff"]),
            ACTIVATIONS[o["act"]](),
            nn.Dropout(0.1),
            nn.Linear(o["d_ff"], o["d_model"]),
        )
        names = ("norm_attn", "norm_ffn") if plus else ("batchnorm_attn", "batchnorm_ffn")
        self.norm_names = names
        for name in names:
            setattr(self, name, norm_over(o["d_model"], o["norm"]))

    def forward(self, x: torch.Tensor, before: Any = None, padded: Any = None) -> Any:
        first, second = (getattr(self, name) for name in self.norm_names)
        if self.pre_norm:
            x = first(x)
        attended = self.self_attn(x, before, padded)
        x = x + attended[0]
        x = second(x) if self.pre_norm else first(x)
        x = x + self.ff(x)
        if not self.pre_norm:
            x = second(x)
        return (x, attended[2]) if self.residual else x


class Stack(nn.Module):
    def __init__(self, plus: bool, o: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(plus, o) for _ in range(o["n_layers"]))
        self.res_attention = plus and o["res_attention"]

    def forward(self, x: torch.Tensor, padded: Any = None) -> torch.Tensor:
        return run_layers(self.layers, x, padded)


def run_layers(layers: nn.ModuleList, x: torch.Tensor, padded: Any = None) -> torch.Tensor:
    before = None
    for layer in layers:
        out = layer(x, before, padded)
        x, before = out if isinstance(out, tuple) else (out, None)
    return x


DEFAULTS: dict[str, Any] = {
    "d_model": 16, "n_heads": 4, "d_ff": 24, "n_layers": 2, "act": "gelu", "norm": "BatchNorm",
    "d_k": None, "res_attention": True, "pre_norm": False,
}  # fmt: skip


def input_encoding(c_in: int, seq_len: int, max_seq_len: Any, d_model: int, conv: Any) -> Any:
    """The module and the number of positions."""
    if max_seq_len is not None and seq_len > max_seq_len:
        width = math.ceil(seq_len / max_seq_len)
        total = width * max_seq_len - seq_len
        around = (total // 2, total - total // 2)
        conv1d = nn.Conv1d(c_in, d_model, width, stride=width)
        return nn.Sequential(Pad1d(around), conv1d), max_seq_len
    if conv:
        made = nn.Conv1d(c_in, d_model, **conv)
        return made, made(torch.zeros(1, c_in, seq_len)).shape[2]
    return nn.Linear(c_in, d_model), seq_len


class TST(nn.Module):
    def __init__(
        self, c_in: int, c_out: int, seq_len: int, max_seq_len: Any = None, conv: Any = None,
        fc_dropout: float = 0.0, y_range: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        o = DEFAULTS | options
        self.seq_len = seq_len
        self.W_P, q_len = input_encoding(c_in, seq_len, max_seq_len, o["d_model"], conv)
        self.W_pos = nn.Parameter(torch.zeros(q_len, o["d_model"]))
        self.encoder = Stack(False, o)
        parts: list[nn.Module] = [ACTIVATIONS[o["act"]](), Flatten()]
        parts += [nn.Dropout(fc_dropout)] if fc_dropout else []
        parts += [nn.Linear(q_len * o["d_model"], c_out)]
        parts += [SigmoidRange(*y_range)] if y_range else []
        self.head = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = isinstance(self.W_P, nn.Linear)
        u = self.W_P(x.transpose(1, 2)) if linear else self.W_P(x).transpose(1, 2)
        return self.head(self.encoder(u + self.W_pos).transpose(1, 2))


class Backbone(nn.Module):
    def __init__(
        self, c_in: int, seq_len: int, max_seq_len: Any, conv: Any, one_position: bool,
        key_padding_mask: Any, padding_var: Any, attn_mask: Any, o: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.W_P, q_len = input_encoding(c_in, seq_len, max_seq_len, o["d_model"], conv)
        self.W_pos = nn.Parameter(torch.zeros(q_len, 1 if one_position else o["d_model"]))
        self.encoder = Stack(True, o)
        self.seq_len = q_len
        self.key_padding_mask, self.padding_var = key_padding_mask, padding_var
        self.attn_mask = attn_mask

    def forward(self, given: Any) -> torch.Tensor:
        padded = None
        if isinstance(given, tuple):
            x, padded = given
        elif self.key_padding_mask == "auto":
            x, missing = given, given.isnan()
            x[missing] = 0  # writes into what it was given, as the original does
            padded = missing.all(1) if bool(missing.any()) else None
        else:
            x = given
        linear = isinstance(self.W_P, nn.Linear)
        u = self.W_P(x.transpose(1, 2)) if linear else self.W_P(x).transpose(1, 2)
        z = self.encoder(u + self.W_pos, padded).transpose(1, 2)
        return z if padded is None else z * (~padded)[:, None]


class TSTPlus(nn.Sequential):
    def __init__(
        self, c_in: int, c_out: int, seq_len: int, max_seq_len: Any = 512, conv: Any = None,
        one_position: bool = False, flatten: bool = True, concat_pool: bool = False,
        bn: bool = False, fc_dropout: float = 0.0, y_range: Any = None,
        key_padding_mask: Any = "auto", padding_var: Any = None, attn_mask: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        o = DEFAULTS | options
        backbone = Backbone(
            c_in, seq_len, max_seq_len, conv, one_position, key_padding_mask, padding_var,
            attn_mask, o,
        )  # fmt: skip
        width = o["d_model"]
        parts: list[nn.Module] = [GACP1d() if concat_pool else GAP1d()]
        width *= 2 if concat_pool else 1
        if flatten:
            parts, width = [ACTIVATIONS[o["act"]](), Flatten()], o["d_model"] * backbone.seq_len
        last: list[nn.Module] = [nn.BatchNorm1d(width)] if bn else []
        last += [nn.Dropout(fc_dropout)] if fc_dropout else []
        parts += [nn.Sequential(*last, nn.Linear(width, c_out, bias=not bn))]
        parts += [SigmoidRange(*y_range)] if y_range else []
        super().__init__(OrderedDict(backbone=backbone, head=nn.Sequential(*parts)))


class RevIN(nn.Module):
    def __init__(self, c_in: int, affine: bool, subtract_last: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.affine, self.subtract_last, self.eps = affine, subtract_last, eps
        self.weight = nn.Parameter(torch.ones(1, c_in, 1))
        self.bias = nn.Parameter(torch.zeros(1, c_in, 1))

    def forward(self, x: torch.Tensor, normalise: bool) -> torch.Tensor:
        if normalise:
            self.sub = x[..., -1:] if self.subtract_last else x.mean(-1, keepdim=True)
            self.std = x.std(-1, keepdim=True, unbiased=False) + self.eps
            x = (x - self.sub) / self.std
            return x * self.weight + self.bias if self.affine else x
        x = (x - self.bias) / self.weight if self.affine else x
        return x * self.std + self.sub


class ChannelStack(nn.Module):
    def __init__(self, patch_num: int, patch_len: int, o: dict[str, Any]) -> None:
        super().__init__()
        self.W_P = nn.Linear(patch_len, o["d_model"])
        self.W_pos = nn.Parameter(torch.zeros(patch_num, o["d_model"]))
        self.layers = nn.ModuleList(Layer(True, o) for _ in range(o["n_layers"]))
        self.res_attention = o["res_attention"]

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x = self.W_P(patches)  # [batch, channel, pos, d_model]
        batch, channels = x.shape[:2]
        x = run_layers(self.layers, x.flatten(0, 1) + self.W_pos)
        return x.unflatten(0, (batch, channels)).transpose(2, 3)


class FlattenHead(nn.Module):
    def __init__(self, individual: bool, n_vars: int, width: int, horizon: int) -> None:
        super().__init__()
        self.individual = individual
        if individual:
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Flatten(-2), nn.Linear(width, horizon)) for _ in range(n_vars)
            )
        else:
            self.layer = nn.Sequential(nn.Flatten(-2), nn.Linear(width, horizon))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.individual:
            return torch.stack([f(x[:, c]) for c, f in enumerate(self.layers)], 1)
        return self.layer(x)


class PatchBackbone(nn.Module):
    def __init__(self, c_in: int, seq_len: int, horizon: int, o: dict[str, Any]) -> None:
        super().__init__()
        self.patch_len, self.stride, self.n_vars = o["patch_len"], o["stride"], c_in
        self.revin = o["revin"]
        self.revin_layer = RevIN(c_in, o["affine"], o["subtract_last"])
        self.padding_patch_layer = nn.ReplicationPad1d((self.stride, 0))
        patch_num = (seq_len - self.patch_len) // self.stride + 2
        self.backbone = ChannelStack(patch_num, self.patch_len, o)
        width = o["d_model"] * patch_num
        self.head = FlattenHead(o["individual"], c_in, width, horizon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.revin_layer(x, True) if self.revin else x
        x = self.padding_patch_layer(x)
        starts = range(0, x.shape[2] - self.patch_len + 1, self.stride)
        patches = torch.stack([x[:, :, s : s + self.patch_len] for s in starts], 2)
        x = self.head(self.backbone(patches))
        return self.revin_layer(x, False) if self.revin else x


class PatchTST(nn.Module):
    def __init__(self, c_in: int, seq_len: int, pred_dim: int, **options: Any) -> None:
        super().__init__()
        defaults = {
            "patch_len": 8, "stride": 4, "revin": True, "affine": False, "subtract_last": False,
            "individual": False, "decomposition": False,
        }  # fmt: skip
        o = DEFAULTS | defaults | options
        self.decomposition = o["decomposition"]
        if self.decomposition:
            self.model_trend = PatchBackbone(c_in, seq_len, pred_dim, o)
            self.model_res = PatchBackbone(c_in, seq_len, pred_dim, o)
        else:
            self.model = PatchBackbone(c_in, seq_len, pred_dim, o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


for made in (TST, TSTPlus, PatchTST):
    made.__module__ = f"tsai.models.{made.__name__}"
