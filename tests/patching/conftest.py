"""Small random models of every kind that patching has to get right, and series for them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tstlens.model import (
    ConvStemConfig,
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)


@dataclass(frozen=True)
class Case:
    """A model with clean and corrupted series of three pairs."""

    model: HookedTST
    clean: torch.Tensor
    corrupted: torch.Tensor

    @property
    def target(self) -> torch.Tensor:
        return torch.tensor([0, 3, 1])


TRUNK = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_mlp": 20, "n_channels": 4, "n_time": 10}

CONFIGS = {
    "pre-norm per step, max": HookedTSTConfig(
        **TRUNK,
        embed=PerStepConfig(),
        head=HeadConfig("max", n_classes=5),
        positions="learned",
        final_norm=True,
        act_fn="gelu",
    ),
    "post-norm conv stem, mean": HookedTSTConfig(
        **TRUNK,
        embed=ConvStemConfig((8, 12), (3, 3), (1, 2), (1, 1)),
        head=HeadConfig("mean", n_classes=5),
        positions="sinusoidal",
        norm_position="post",
    ),
    "pre-norm RMS causal patches, last": HookedTSTConfig(
        **TRUNK,
        embed=LinearPatchesConfig(2, 2),
        head=HeadConfig("last", n_classes=5),
        normalization_type="RMS",
        causal=True,
    ),
    "channel-independent patches, flatten": HookedTSTConfig(
        **TRUNK,
        embed=LinearPatchesConfig(4, 2, channel_independent=True),
        head=HeadConfig("flatten", n_classes=5),
        positions="learned",
    ),
}


def randomised(cfg: HookedTSTConfig, seed: int = 0) -> HookedTST:
    """A model with every weight and bias drawn at random, attention far from uniform."""
    torch.manual_seed(seed)
    model = HookedTST(HookedTSTConfig.from_dict(cfg.to_dict()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("head."):  # logits stay near 1, so 1e-5 is a fair tolerance
                scale = 0.6 if name.endswith(("Q", "K")) else 0.3
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.fixture(params=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of model in turn."""
    return make_case(request.param)


def make_case(name: str) -> Case:
    model = randomised(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randn(2, 3, 4, 10, generator=generator)
    return Case(model, clean, corrupted)


@pytest.fixture
def pre_norm() -> Case:
    return make_case("pre-norm per step, max")


@pytest.fixture
def channel_independent() -> Case:
    return make_case("channel-independent patches, flatten")
