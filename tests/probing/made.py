"""Small random models and series whose labels nothing in the series knows."""

from __future__ import annotations

import torch

from tstlens.data import TimeSeriesData
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig, PerStepConfig


def small(per_channel: bool = False, **changes) -> HookedTST:
    embed = LinearPatchesConfig(2, 2, channel_independent=True) if per_channel else PerStepConfig()
    options = {
        "n_layers": 3,
        "d_model": 8,
        "n_heads": 2,
        "d_mlp": 12,
        "n_channels": 3,
        "n_time": 10,
        "embed": embed,
        "head": HeadConfig("flatten" if per_channel else "mean", n_classes=4),
        "positions": "learned",
        "norm_position": "pre",
        "model_name": "small",
        **changes,
    }
    return HookedTST(HookedTSTConfig(**options))


def labelled(
    n: int = 40, seed: int = 0, n_classes: int = 2, padded: bool = False
) -> TimeSeriesData:
    """White noise with balanced labels in random order."""
    generator = torch.Generator().manual_seed(seed)
    series = torch.randn(n, 3, 10, generator=generator)
    labels = (torch.arange(n) % n_classes)[torch.randperm(n, generator=generator)]
    mask = None
    if padded:
        mask = torch.ones(n, 10, dtype=torch.bool)
        mask[::3, 6:] = False
    names = tuple("abcdefghij"[:n_classes])
    return TimeSeriesData(series, labels, names, mask=mask, name="noise")
