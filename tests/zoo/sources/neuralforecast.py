"""PatchTST and iTransformer of neuralforecast 3.3.0, and the authors' PatchTST_backbone, restated.

For where neuralforecast cannot be installed; modules are named as in its state dicts. The tests
compare these with neuralforecast itself where that is there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.zoo.sources import tslib
from tests.zoo.sources.tsai import DEFAULTS, Stack


class RevIN(nn.Module):
    def __init__(self, channels: int, affine: bool, subtract_last: bool) -> None:
        super().__init__()
        self.affine, self.subtract_last, self.eps = affine, subtract_last, 1e-5
        if affine:
            self.affine_weight = nn.Parameter(torch.ones(channels))
            self.affine_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        """[batch, time, channel]."""
        if mode == "norm":
            self.center = x[:, -1:] if self.subtract_last else x.mean(1, keepdim=True)
            self.stdev = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + self.eps)
            x = (x - self.center) / self.stdev
            return x * self.affine_weight + self.affine_bias if self.affine else x
        if self.affine:
            x = (x - self.affine_bias) / (self.affine_weight + self.eps**2)
        return x * self.stdev + self.center


class Head(nn.Module):
    def __init__(self, individual: bool, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.individual = individual
        if individual:
            self.linears = nn.ModuleList(nn.Linear(width, out) for _ in range(channels))
        else:
            self.linear = nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(-2)
        if self.individual:
            return torch.stack([f(x[:, c]) for c, f in enumerate(self.linears)], 1)
        return self.linear(x)


class ChannelStack(nn.Module):
    def __init__(self, patch_num: int, patch_len: int, o: dict[str, Any]) -> None:
        super().__init__()
        self.W_P = nn.Linear(patch_len, o["d_model"])
        self.W_pos = nn.Parameter(torch.zeros(patch_num, 1 if o["one_position"] else o["d_model"]))
        self.encoder = Stack(True, o)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x = self.W_P(patches)
        batch, channels = x.shape[:2]
        x = self.encoder(x.flatten(0, 1) + self.W_pos)
        return x.unflatten(0, (batch, channels)).transpose(2, 3)


BACKBONE: dict[str, Any] = {
    **DEFAULTS, "patch_len": 8, "stride": 4, "revin": True, "affine": True,
    "subtract_last": False, "individual": False, "padding_patch": "end", "one_position": False,
    "pretrain_head": False,
}  # fmt: skip


class PatchTST_backbone(nn.Module):
    def __init__(self, channels: int, n_time: int, horizon: int, **options: Any) -> None:
        super().__init__()
        o = BACKBONE | options
        self.revin, self.stride, self.n_vars = o["revin"], o["stride"], channels
        self.padding_patch, self.patch_len = o["padding_patch"], o["patch_len"]
        self.pretrain_head, self.head_type = o["pretrain_head"], "flatten"
        if self.revin:
            self.revin_layer = RevIN(channels, o["affine"], o["subtract_last"])
        patch_num = int((n_time - self.patch_len) / self.stride + 1)
        patch_num += self.padding_patch == "end"
        self.backbone = ChannelStack(patch_num, self.patch_len, o)
        self.head = Head(o["individual"], channels, o["d_model"] * patch_num, horizon)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.revin:
            z = self.revin_layer(z.transpose(1, 2), "norm").transpose(1, 2)
        if self.padding_patch == "end":
            z = torch.cat([z, z[:, :, -1:].repeat(1, 1, self.stride)], 2)
        starts = range(0, z.shape[2] - self.patch_len + 1, self.stride)
        z = torch.stack([z[:, :, s : s + self.patch_len] for s in starts], 2)
        z = self.head(self.backbone(z))
        if self.revin:
            z = self.revin_layer(z.transpose(1, 2), "denorm").transpose(1, 2)
        return z


class Loss(nn.Module):
    """What a loss adds to a state dict."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.outputsize_multiplier = n_outputs
        if n_outputs > 1:
            self.quantiles = nn.Parameter(torch.linspace(0.1, 0.9, n_outputs), requires_grad=False)


class Forecaster(nn.Module):
    def _around(self, h: int, n_outputs: int, scaler_type: str) -> None:
        self.h, self.loss, self.valid_loss = h, Loss(n_outputs), Loss(n_outputs)
        self.scaler = SimpleNamespace(scaler_type=scaler_type)


class PatchTST(Forecaster):
    def __init__(
        self, h: int, input_size: int, n_outputs: int = 1, scaler_type: str = "identity",
        attn_dropout: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._around(h, n_outputs, scaler_type)
        o = {"affine": False, "subtract_last": True, **options}
        self.model = PatchTST_backbone(1, input_size, h * n_outputs, **o)
        layers: Any = self.model.backbone.encoder.layers
        for layer in layers:
            layer.self_attn.sdp_attn.attn_dropout = nn.Dropout(attn_dropout)

    def forward(self, windows_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.model(windows_batch["insample_y"].permute(0, 2, 1))
        return x.reshape(len(x), self.h, -1)


class iTransformer(Forecaster):
    def __init__(
        self, h: int, input_size: int, n_series: int, n_outputs: int = 1, futr: bool = False,
        use_norm: bool = True, scaler_type: str = "identity", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._around(h, n_outputs, scaler_type)
        o = tslib.DEFAULTS | options
        self.enc_in, self.use_norm = n_series, use_norm
        self.enc_embedding = tslib.InvertedEmbedding(input_size, o["d_model"])
        if futr:
            self.futr_embedding = nn.Linear(input_size + h, o["d_model"])
        self.encoder = tslib.Encoder(tslib.layers_of(o), nn.LayerNorm(o["d_model"]))
        self.projector = nn.Linear(o["d_model"], h * n_outputs)

    def forward(self, windows_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = windows_batch["insample_y"]
        if self.use_norm:
            means = x.mean(1, keepdim=True)
            stdev = torch.sqrt((x - means).var(1, keepdim=True, unbiased=False) + 1e-5)
            x = (x - means) / stdev
        out = self.projector(self.encoder(self.enc_embedding(x, None))).permute(0, 2, 1)
        if self.use_norm:
            out = out * stdev + means
        return out.reshape(len(out), self.h, -1)


class AuthorsModel(nn.Module):
    """``Model`` of the authors' repository around the backbone; [batch, time, channel]."""

    def __init__(self, channels: int, n_time: int, horizon: int, **options: Any) -> None:
        super().__init__()
        self.decomposition = options.pop("decomposition", False)
        if self.decomposition:
            self.model_trend = PatchTST_backbone(channels, n_time, horizon, **options)
            self.model_res = PatchTST_backbone(channels, n_time, horizon, **options)
        else:
            self.model = PatchTST_backbone(channels, n_time, horizon, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.permute(0, 2, 1)).permute(0, 2, 1)


AuthorsModel.__module__, AuthorsModel.__qualname__ = "models.PatchTST", "Model"
PatchTST.__module__ = "neuralforecast.models.patchtst"
iTransformer.__module__ = "neuralforecast.models.itransformer"
PatchTST_backbone.__module__ = "layers.PatchTST_backbone"
