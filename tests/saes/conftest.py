"""A small random model, its data, and planted features."""

from __future__ import annotations

import pytest
import torch

from tstlens.data import TimeSeriesData
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig, PerStepConfig


def small(**changes) -> HookedTST:
    options = {
        "n_layers": 2,
        "d_model": 8,
        "n_heads": 2,
        "d_mlp": 12,
        "n_channels": 3,
        "n_time": 10,
        "embed": PerStepConfig(),
        "head": HeadConfig("mean", n_classes=4),
        "positions": "learned",
        "norm_position": "post",
        "model_name": "small",
        **changes,
    }
    return HookedTST(HookedTSTConfig(**options))


@pytest.fixture(scope="session")
def make_model():
    return small


@pytest.fixture
def model() -> HookedTST:
    return small()


@pytest.fixture
def per_channel_model() -> HookedTST:
    embed = LinearPatchesConfig(2, 2, channel_independent=True)
    return small(embed=embed, head=HeadConfig("flatten", n_classes=4))


@pytest.fixture(scope="session")
def data() -> TimeSeriesData:
    """Forty series, every third with four padded samples at its end."""
    generator = torch.Generator().manual_seed(1)
    series = torch.randn(40, 3, 10, generator=generator)
    mask = torch.ones(40, 10, dtype=torch.bool)
    mask[::3, 6:] = False
    labels = torch.randint(0, 4, (40,), generator=generator)
    names = ("a", "b", "c", "d")
    return TimeSeriesData(series, labels, names, mask=mask, name="toy", split="train")


@pytest.fixture(scope="session")
def full(data) -> TimeSeriesData:
    """The same without padding."""
    return TimeSeriesData(data.series, data.labels, data.class_names, name="toy", split="train")
