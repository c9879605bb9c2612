"""Small planted data: classes that differ in the frequency of a sine."""

from __future__ import annotations

import pytest
import torch

from tstlens.data import TimeSeriesData
from tstlens.training import ConvTST, ConvTSTConfig


def planted(n: int = 24, n_time: int = 20, seed: int = 0, masked: bool = False) -> TimeSeriesData:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    time = torch.arange(n_time) / n_time
    phase = torch.rand(n, 2, 1, generator=generator)
    series = torch.sin(6.28 * ((labels + 1)[:, None, None] * 2 * time + phase))
    series = series + 0.1 * torch.randn(n, 2, n_time, generator=generator)
    mask = None
    if masked:
        lengths = torch.randint(n_time // 2, n_time + 1, (n,), generator=generator)
        mask = torch.arange(n_time) < lengths[:, None]
    return TimeSeriesData(series, labels, ("slow", "middle", "fast"), mask)


@pytest.fixture
def make_data():
    """Makes planted data of another size, seed or with padding."""
    return planted


@pytest.fixture
def data() -> TimeSeriesData:
    return planted()


@pytest.fixture
def small() -> ConvTSTConfig:
    return ConvTSTConfig(
        n_channels=2,
        n_time=20,
        n_classes=3,
        conv_channels=(8, 16),
        kernel_sizes=(5, 3),
        strides=(1, 2),
        n_heads=4,
        d_mlp=32,
        n_layers=2,
    )


@pytest.fixture
def fresh(small):
    """Makes the same small model every time."""

    def make(**sizes) -> ConvTST:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return ConvTST(small, **sizes)

    return make
