"""Small random models of every kind, and the forward pass stated once more in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tstlens.model import (
    ConvStemConfig,
    CustomConfig,
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)

N_CHANNELS, N_TIME = 3, 12

EMBEDS: dict[str, Any] = {
    "conv": ConvStemConfig((6, 8), (5, 3), (1, 2), (2, 1)),
    "conv-folded": ConvStemConfig((8,), (3,), (1,), (1,), batch_norm="folded", activation="gelu"),
    "patches": LinearPatchesConfig(4, 2, padding=2),
    "patches-ci": LinearPatchesConfig(4, 4, channel_independent=True),
    "per-step": PerStepConfig(),
    "custom": CustomConfig("tests.Embed"),
}


class Embed(nn.Module):
    """A front end of the user's own: every sample of every channel through a small network."""

    def __init__(self, n_channels: int = N_CHANNELS, d_model: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(n_channels, 5)
        self.second = nn.Linear(5, d_model)

    def forward(self, series: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(series.transpose(1, 2))))


class Head(nn.Module):
    """A head of the user's own."""

    def __init__(self, d_model: int = 8, n_classes: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, n_classes)

    def forward(self, residual: Tensor) -> Tensor:
        return self.linear(residual.mean(1))


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every trained weight random, norms' gains near one, running statistics not their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = name.endswith((".w", "norm.weight"))
            scale = 0.1 if gain or parameter.ndim == 1 else 1.5 / math.sqrt(parameter.shape[-2])
            parameter.copy_(scale * noise + float(gain))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                drawn = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(drawn + 0.5)


def build(embed: str | Any = "per-step", seed: int = 0, **changes: Any) -> HookedTST:
    """A small random model; ``embed`` is a key of EMBEDS or a front end's config."""
    options: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 8,
        "n_heads": 2,
        "d_mlp": 10,
        "embed": EMBEDS[embed] if isinstance(embed, str) else embed,
        "head": HeadConfig("mean", n_classes=4),
        "n_channels": N_CHANNELS,
        "n_time": N_TIME,
        **changes,
    }
    cfg = HookedTSTConfig(**options)
    modules: dict[str, nn.Module] = {}
    if isinstance(cfg.embed, CustomConfig):
        modules["embed"] = Embed(d_model=cfg.d_model)
    if isinstance(cfg.head, CustomConfig):
        modules["head"] = Head(d_model=cfg.d_model)
    model = HookedTST(cfg, **modules)
    randomise(model, seed)
    return model


_ACTS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def _norm(cfg: HookedTSTConfig, norm: Any, x: Tensor) -> Tensor:
    if cfg.normalization_type == "LN":
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + cfg.eps) * norm.w + norm.b
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + cfg.eps) * norm.w


def _tokens(model: HookedTST, series: Tensor) -> list[Tensor]:
    """One [pos, d_model] per row of the trunk, for one series [channel, time]."""
    front, module = model.cfg.embed, model.embed
    if isinstance(front, PerStepConfig):
        steps = [
            sum(series[c, t] * module.W_E[c] for c in range(len(series)))
            for t in range(series.shape[1])
        ]
        return [torch.stack(steps) + module.b_E]
    if isinstance(front, LinearPatchesConfig):
        extended = torch.cat([series, *[series[:, -1:]] * front.padding], 1)
        starts = list(range(0, extended.shape[1] - front.patch_len + 1, front.stride))
        left = extended.shape[1] - (starts[-1] + front.patch_len)
        if front.leftover == "drop_start":
            starts = [start + left for start in starts]
        cut = [extended[:, start : start + front.patch_len] for start in starts]
        if front.channel_independent:
            return [
                torch.stack([patch[c] @ module.W_E for patch in cut]) + module.b_E
                for c in range(len(series))
            ]
        return [torch.stack([patch.reshape(-1) @ module.W_E for patch in cut]) + module.b_E]
    if isinstance(front, ConvStemConfig):
        x = series[None]
        for number, stage in enumerate(module.stages):
            conv = stage.conv
            x = functional.conv1d(
                functional.pad(x, (front.paddings[number],) * 2),
                conv.weight,
                conv.bias,
                stride=front.strides[number],
            )
            if front.batch_norm == "live":
                norm = stage.norm
                spread = torch.sqrt(norm.running_var + norm.eps)[:, None]
                x = (x - norm.running_mean[:, None]) / spread
                x = x * norm.weight[:, None] + norm.bias[:, None]
            x = _ACTS[front.activation](x)
        return [x[0].T]
    return [module.module(series[None])[0]]


def _positions(model: HookedTST, n_pos: int) -> Tensor | float:
    cfg = model.cfg
    if cfg.positions == "none":
        return 0.0
    if cfg.positions == "learned":
        return model.pos_embed.W_pos[:n_pos]
    table = [
        [
            (math.sin if m % 2 == 0 else math.cos)(p / 10000 ** (2 * (m // 2) / cfg.d_model))
            for m in range(cfg.d_model)
        ]
        for p in range(n_pos)
    ]
    return torch.tensor(table, dtype=torch.float32).to(cfg.dtype)


def _block(cfg: HookedTSTConfig, block: Any, x: Tensor) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        attn, out = block.attn, block.attn.b_O.expand_as(x)
        for head in range(cfg.n_heads):
            q, k, v = (
                x @ getattr(attn, f"W_{part}")[head] + getattr(attn, f"b_{part}")[head]
                for part in "QKV"
            )
            scores = q @ k.T / (cfg.attn_scale or math.sqrt(cfg.d_head))
            if cfg.causal:
                hidden = torch.ones_like(scores).triu(1).bool()
                scores = scores.masked_fill(hidden, -torch.inf)
            out = out + torch.softmax(scores, -1) @ v @ attn.W_O[head]
        return out

    def mlp(x: Tensor) -> Tensor:
        hidden = _ACTS[cfg.act_fn](x @ block.mlp.W_in + block.mlp.b_in)
        return hidden @ block.mlp.W_out + block.mlp.b_out

    if cfg.norm_position == "pre":
        x = x + attention(_norm(cfg, block.ln1, x))
        return x + mlp(_norm(cfg, block.ln2, x))
    x = _norm(cfg, block.ln1, x + attention(x))
    return _norm(cfg, block.ln2, x + mlp(x))


_POOLS = {
    "max": lambda x: x.max(0).values,
    "mean": lambda x: x.sum(0) / len(x),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
    "flatten": lambda x: torch.cat(list(x)),
}


def restated(model: HookedTST, series: Tensor) -> Tensor:
    """The model's output, one series and one head at a time, in plain torch, without masks."""
    cfg, outputs = model.cfg, []
    for one in series:
        pooled = []
        for x in _tokens(model, one):
            x = x + _positions(model, len(x))
            for block in model.blocks:
                x = _block(cfg, block, x)
            if cfg.final_norm:
                x = _norm(cfg, model.ln_final, x)
            if isinstance(cfg.head, CustomConfig):
                pooled.append(x)
                continue
            if cfg.head.pooling == "flatten" and len(x) < cfg.n_ctx:
                x = torch.cat([x, torch.zeros(cfg.n_ctx - len(x), cfg.d_model, dtype=x.dtype)])
            pooled.append(_POOLS[cfg.head.pooling](x))
        if isinstance(cfg.head, CustomConfig):
            outputs.append(model.head.module(pooled[0][None])[0])
        elif cfg.head.horizon is None:
            outputs.append(torch.cat(pooled) @ model.W_U + model.b_U)
        elif cfg.channel_independent:
            outputs.append(torch.stack([one @ model.W_U + model.b_U for one in pooled]))
        else:
            flat = pooled[0] @ model.W_U + model.b_U
            outputs.append(torch.stack(flat.split(cfg.head.horizon)))
    return torch.stack(outputs)


@pytest.fixture(scope="session")
def make_model() -> Any:
    """``make_model("conv", norm_position="post", …)`` builds a small random model."""
    return build


@pytest.fixture(scope="session")
def plain_forward() -> Any:
    """The forward pass stated once more in plain torch."""
    return restated


@pytest.fixture(scope="session")
def own_modules() -> Any:
    """The classes of a front end and a head of the user's own."""
    return Embed, Head


@pytest.fixture
def series() -> Tensor:
    return torch.randn(4, N_CHANNELS, N_TIME, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask() -> Tensor:
    """Padding at the end of three of four series; the lengths are whole patches of four."""
    return torch.arange(N_TIME)[None] < torch.tensor([12, 8, 4, 8])[:, None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``norm_position`` runs over both kinds of block, ``front_end`` over every front end."""
    if "norm_position" in metafunc.fixturenames:
        metafunc.parametrize("norm_position", ["pre", "post"])
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "front_end" in metafunc.fixturenames and "front_end" not in given:
        metafunc.parametrize("front_end", list(EMBEDS))
