"""Small random models and codebooks on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tstlens.codebooks import Codebook, CodebookConfig
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig, PerStepConfig


def small(**changes: Any) -> HookedTST:
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
def make_model() -> Any:
    return small


@pytest.fixture(scope="session")
def make_book() -> Any:
    """``make_book(d_in=8, k=2, …)``: sixteen codes."""

    def make(d_in: int = 8, n_codes: int = 16, **options: Any) -> Codebook:
        return Codebook(CodebookConfig(d_in=d_in, n_codes=n_codes, **options))

    return make


@pytest.fixture
def model() -> HookedTST:
    return small()


@pytest.fixture
def per_channel_model() -> HookedTST:
    embed = LinearPatchesConfig(2, 2, channel_independent=True)
    return small(embed=embed, head=HeadConfig("flatten", n_classes=4))


@pytest.fixture
def series() -> Tensor:
    return torch.randn(6, 3, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask() -> Tensor:
    """Padding at the end of every other series."""
    return torch.arange(10)[None] < torch.tensor([10, 6, 10, 4, 10, 7])[:, None]
