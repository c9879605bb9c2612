"""One small pre-norm classifier, which every peer opens in its own words."""

from __future__ import annotations

import pytest
import torch

from tstlens import HookedTST
from tstlens.model import HeadConfig, HookedTSTConfig, LinearPatchesConfig


@pytest.fixture
def model() -> HookedTST:
    cfg = HookedTSTConfig(
        n_layers=3,
        d_model=16,
        n_heads=4,
        d_mlp=24,
        embed=LinearPatchesConfig(4, 4),
        head=HeadConfig("last", n_classes=5),
        n_channels=2,
        n_time=24,
        norm_position="pre",
        seed=3,
    )
    made = HookedTST(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the start of a training, where heads do next to nothing
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture
def series() -> torch.Tensor:
    return torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def other() -> torch.Tensor:
    """The series whose activations are put in."""
    return torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(5))
