"""Small sources to convert."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.recording import DOCS, Recorder
from tstlens.storage import write_text
from tstlens.training import ConvTST


@pytest.fixture(scope="session", autouse=True)
def recorded() -> Iterator[None]:
    """With TSTLENS_WRITE_DOCS=1: the docs' table, written from what the tests converted."""
    if os.environ.get("TSTLENS_WRITE_DOCS") != "1":
        yield
        return
    recorder = Recorder()
    recorder.install()
    try:
        yield
    finally:
        recorder.remove()
    write_text(DOCS, recorder.page())


def shake(module: nn.Module) -> None:
    """Give norms, biases and running statistics values that are not their defaults."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


@pytest.fixture(scope="session")
def conv_tst() -> Any:
    """Makes a small ConvTST with norms that do something."""

    def make(**sizes: Any) -> ConvTST:
        options: dict[str, Any] = {
            "n_channels": 2,
            "n_time": 14,
            "n_classes": 3,
            "conv_channels": (6, 8),
            "kernel_sizes": (5, 3),
            "strides": (1, 1),
            "n_heads": 2,
            "d_mlp": 12,
            "n_layers": 2,
        }
        source = ConvTST(**{**options, **sizes})
        shake(source)
        return source

    return make


class Embed(nn.Module):
    def __init__(self, d_model: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(3, d_model)
        self.dropout = nn.Dropout(0.5)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(series.transpose(1, 2)))


class Head(nn.Module):
    def __init__(self, d_model: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, 4)

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        return self.linear(residual.amax(1))


@pytest.fixture(scope="session")
def ends() -> Any:
    """Makes a front end and a head of the user's own, as arguments of ``convert``."""
    return lambda d_model=8: {"embed": Embed(d_model), "head": Head(d_model)}


@pytest.fixture(scope="session")
def encoder() -> Any:
    """Makes a small torch.nn.TransformerEncoder with norms that do something."""

    def make(n_layers: int = 2, norm: Any = None, d_model: int = 8, **options: Any) -> Any:
        options = {"nhead": 2, "dim_feedforward": 12, "batch_first": True, **options}
        layer = nn.TransformerEncoderLayer(d_model, **options)
        made = nn.TransformerEncoder(layer, n_layers, norm=norm, enable_nested_tensor=False)
        for number, parameter in enumerate(made.parameters()):  # layers start as copies
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=torch.Generator().manual_seed(number))
        shake(made)
        return made

    return make
