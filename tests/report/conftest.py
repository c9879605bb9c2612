"""A small classifier with errors of its own, its data, and one report on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tstlens
from tstlens import report
from tstlens.data import TimeSeriesData
from tstlens.training import ConvTST, train

NAMES = ("slow <b>&", "middle", "fast")  # a name that HTML must not take for markup


def planted(n: int, seed: int) -> TimeSeriesData:
    """Sines of three frequencies under noise that makes some of them hard."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    time = torch.arange(24) / 24
    phase = 3 * torch.rand(n, 2, 1, generator=generator)
    series = torch.sin(6.28 * (labels + 1)[:, None, None] * time + phase)
    series = series + 0.9 * torch.randn(n, 2, 24, generator=generator)
    return TimeSeriesData(series, labels, NAMES, name="planted", split="test")


@pytest.fixture(scope="session")
def data() -> TimeSeriesData:
    return planted(90, seed=1)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    source = ConvTST(
        n_channels=2, n_time=24, n_classes=3, conv_channels=(8, 16), kernel_sizes=(5, 3),
        strides=(1, 2), n_heads=4, d_mlp=32, n_layers=2,
    )  # fmt: skip
    options = {"epochs": 12, "val_fraction": 0.0, "select": "last", "progress": False}
    train(source, planted(120, seed=0), lr=3e-3, **options)
    converted = tstlens.convert(source, class_names=NAMES)
    converted.cfg.model_name = "planted model"
    return converted


@pytest.fixture(scope="session")
def page(model, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "planted.html"
    return report.build(model, out, data=data, max_pairs=8, seed=3, progress=False)


@pytest.fixture(scope="session")
def numbers(page):
    return json.loads(page.with_suffix(".json").read_text())
