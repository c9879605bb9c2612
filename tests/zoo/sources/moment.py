"""MOMENT, restated on transformers' T5: for where momentfm cannot be installed.

The classes carry the names of momentfm's, because conversion recognises a source by its name.
``test_moment.py`` compares this with momentfm itself where that is there.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel


class Config(SimpleNamespace):
    def getattr(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


class RevIN(nn.Module):
    """Keeps the statistics of the last series, as the original does."""

    def __init__(self, affine: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.affine, self.eps = affine, eps
        if affine:
            self.affine_weight = nn.Parameter(torch.ones(1, 1, 1))
            self.affine_bias = nn.Parameter(torch.zeros(1, 1, 1))

    def scale(self, x: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        kept = x.masked_fill(~observed[:, None].bool(), math.nan)
        self.mean = kept.nanmean(-1, keepdim=True)
        self.deviation = (kept - self.mean).pow(2).nanmean(-1, keepdim=True).sqrt() + self.eps
        x = (x - self.mean) / self.deviation
        if self.affine:
            x = self.affine_weight * x + self.affine_bias
        return torch.nan_to_num(x, nan=0, posinf=0, neginf=0)

    def unscale(self, x: torch.Tensor) -> torch.Tensor:
        if self.affine:
            x = (x - self.affine_bias) / (self.affine_weight + self.eps**2)
        return x * self.deviation + self.mean


class Sinusoids(nn.Module):
    def __init__(self, d_model: int, length: int = 5000) -> None:
        super().__init__()
        rate = torch.exp(torch.arange(0, d_model, 2).float() * -(math.log(10000.0) / d_model))
        angle = torch.arange(length).float()[:, None] * rate
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None])


class PatchEmbedding(nn.Module):
    def __init__(self, d_model: int, patch_len: int, positions: bool, bias: bool) -> None:
        super().__init__()
        self.patch_len, self.add_positional_embedding = patch_len, positions
        self.value_embedding = nn.Linear(patch_len, d_model, bias=bias)
        self.mask_embedding = nn.Parameter(torch.zeros(d_model))
        if positions:
            self.position_embedding = Sinusoids(d_model)

    def forward(self, patches: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        embedded = torch.where(
            shown[:, None, :, None].bool(), self.value_embedding(patches), self.mask_embedding
        )
        if self.add_positional_embedding:
            embedded = embedded + self.position_embedding.pe[:, : patches.shape[2]]
        return embedded


class PretrainHead(nn.Module):
    def __init__(self, d_model: int, patch_len: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, patch_len)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).flatten(2)


class ForecastingHead(nn.Module):
    def __init__(self, width: int, horizon: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten(-2)
        self.linear = nn.Linear(width, horizon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.flatten(x))


class ClassificationHead(nn.Module):
    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean(1))


class MOMENT(nn.Module):
    def __init__(self, task_name: str, t5_config: dict[str, Any], **config: Any) -> None:
        super().__init__()
        self.config = Config(
            **{"transformer_type": "encoder_only", "t5_config": t5_config, **config}
        )
        self.task_name = task_name
        self.seq_len, self.patch_len = config["seq_len"], config["patch_len"]
        read = self.config.getattr
        self.normalizer = RevIN(read("revin_affine", False))
        d_model = t5_config["d_model"]
        self.patch_embedding = PatchEmbedding(
            d_model,
            self.patch_len,
            read("add_positional_embedding", True),
            read("value_embedding_bias", False),
        )
        self.encoder = T5EncoderModel(T5Config.from_dict(t5_config)).get_encoder()
        if task_name == "reconstruction":
            self.head: nn.Module = PretrainHead(d_model, self.patch_len)
        elif task_name == "forecasting":
            self.head = ForecastingHead(
                d_model * (self.seq_len // self.patch_len), read("forecast_horizon")
            )
        elif task_name == "classification":
            channels = read("n_channels") if read("reduction", "concat") == "concat" else 1
            self.head = ClassificationHead(channels * d_model, read("num_class"))
        else:
            self.head = nn.Identity()

    def forward(
        self,
        *,
        x_enc: torch.Tensor,
        input_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        reduction: str = "concat",
    ) -> SimpleNamespace:
        batch, channels, _ = x_enc.shape
        observed = torch.ones_like(x_enc[:, 0]) if input_mask is None else input_mask
        whole = self.by_patch(observed)
        counted, shown = observed, whole
        if self.task_name == "reconstruction":
            given = whole.repeat_interleave(self.patch_len, 1) if mask is None else mask
            counted, shown = given * observed, self.by_patch(given)
        if self.task_name == "forecasting":
            shown = torch.ones_like(whole)
        x = self.normalizer.scale(x_enc, counted)
        x = self.patch_embedding(x.unfold(-1, self.patch_len, self.patch_len), shown)
        x = self.encoder(
            inputs_embeds=x.flatten(0, 1), attention_mask=whole.repeat_interleave(channels, 0)
        ).last_hidden_state
        x = x.unflatten(0, (batch, channels))  # [batch, channel, patch, d_model]
        if self.task_name == "embedding":
            weight = whole[:, :, None]
            return SimpleNamespace(embeddings=(x.mean(1) * weight).sum(1) / weight.sum(1))
        if self.task_name == "classification":
            # Concatenated, channels are the fastest axis.
            joined = x.mean(1) if reduction == "mean" else x.permute(0, 2, 3, 1).flatten(2)
            return SimpleNamespace(logits=self.head(joined))
        out = self.normalizer.unscale(self.head(x))
        entry = "forecast" if self.task_name == "forecasting" else "reconstruction"
        return SimpleNamespace(**{entry: out})

    def by_patch(self, observed: torch.Tensor) -> torch.Tensor:
        return observed.unflatten(1, (-1, self.patch_len)).bool().all(-1).to(observed.dtype)


for restated in (MOMENT, PretrainHead, ForecastingHead, ClassificationHead):
    restated.__module__ = "momentfm.models.moment"
