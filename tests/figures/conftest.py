"""Sweeps with known numbers; no model is needed to draw a result."""

from __future__ import annotations

import pytest
import torch

from tstlens.patching import SweepResult


def made(n_pairs: int = 6, seed: int = 0, unit: str = "nats", n_time: int | None = None, **axes):
    """A sweep over the given axes (name=size), with ``n_time`` samples cut into positions."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n_pairs, *axes.values(), generator=generator)
    cells = None
    if n_time is not None:
        size = -(-n_time // axes["pos"])
        cells = tuple((p * size, min((p + 1) * size, n_time)) for p in range(axes["pos"]))
    name = {"nats": "log-probability", "probability": "probability"}.get(unit, "logit")
    return SweepResult(
        values=values,
        axes=("pair", *axes),
        coords={"pair": tuple(range(n_pairs)), **{k: tuple(range(v)) for k, v in axes.items()}},
        baseline=torch.linspace(-3, -2, n_pairs),
        clean=torch.linspace(-0.2, -0.1, n_pairs),
        metric=f"{name} of the target class",
        unit=unit,
        site="z",
        time_cells=cells,
        n_pairs=n_pairs,
    )


@pytest.fixture
def sweep():
    return made
