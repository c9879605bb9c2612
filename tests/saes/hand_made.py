"""Models and dictionaries whose latents are known by construction; sae-lens is not needed."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tstlens.data import TimeSeriesData
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig, PerStepConfig


class Dictionary(nn.Module):
    """relu((x - b) W_enc + threshold), decoded by W_dec; knows its hook as an SAE does."""

    def __init__(self, W_enc, W_dec, hook, threshold=0.0, **metadata):
        super().__init__()
        self.W_enc = nn.Parameter(W_enc)
        self.W_dec = nn.Parameter(W_dec)
        self.threshold = threshold
        known = {"hook_name": hook, "hook_name_out": None, "hook_head_index": None, **metadata}
        self.cfg = SimpleNamespace(
            metadata=SimpleNamespace(**known),
            d_in=len(W_enc),
            normalize_activations="none",
            reshape_activations="none",
            architecture=lambda: "hand-made",
        )

    def encode(self, x):
        return torch.relu(x @ self.W_enc - self.threshold)

    def decode(self, latents):
        return latents @ self.W_dec


def random_dictionary(width, n_latents, hook, seed=0, threshold=0.3, **metadata):
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(width, n_latents, generator=generator) / width**0.5
    W_dec = torch.randn(n_latents, width, generator=generator)
    return Dictionary(W_enc, W_dec, hook, threshold, **metadata)


def per_step(n_channels=2, d_model=8, n_layers=1, n_classes=3, **options):
    return HookedTST(
        HookedTSTConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_heads=2,
            d_mlp=16,
            n_channels=n_channels,
            embed=PerStepConfig(),
            head=HeadConfig("mean", n_classes=n_classes),
            positions="none",
            **options,
        )
    )


def per_channel(n_channels=3, n_time=32, horizon=4):
    """A forecaster that takes every channel through the trunk by itself."""
    embed = LinearPatchesConfig(patch_len=8, stride=8, channel_independent=True)
    return HookedTST(
        HookedTSTConfig(
            n_layers=2,
            d_model=8,
            n_heads=2,
            d_mlp=16,
            n_channels=n_channels,
            n_time=n_time,
            n_ctx=n_time // 8,
            embed=embed,
            head=HeadConfig("flatten", horizon=horizon),
            positions="learned",
        )
    )


def labelled(n=24, n_channels=2, n_time=16, n_classes=3, padded=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    series = torch.randn(n, n_channels, n_time, generator=generator)
    labels = torch.arange(n) % n_classes
    mask = None
    if padded:
        lengths = 6 + torch.arange(n) % (n_time - 6)
        mask = torch.arange(n_time) < lengths[:, None]
        series = torch.where(mask[:, None], series, torch.full_like(series, 7.5))
    names = tuple(f"class {c}" for c in range(n_classes))
    return TimeSeriesData(series, labels, names, mask, name="made up", split="test")


def axis_dictionary(model, hook="hook_embed", threshold=0.5, n_latents=None):
    """Latent i is how far axis i of the embedding lies above a threshold."""
    width = model.cfg.d_model
    eye = torch.eye(width)[:, : n_latents or width]
    return Dictionary(eye.clone(), eye.T.clone(), hook, threshold)


def read_channels(model):
    """Make the first axes of the embedding the channels themselves."""
    with torch.no_grad():
        model.embed.W_E.zero_()
        for channel in range(model.cfg.n_channels):
            model.embed.W_E[channel, channel] = 1
        model.embed.b_E.zero_()
    return model
