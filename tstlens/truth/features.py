"""Planted sparse features: activations that are sums of a few known directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import Amount, Count, Positive, Seed, checked
from tstlens.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class PlantedFeatures:
    """Activations with the features that they are made of.

    Args:
        directions: [feature, width] unit vectors.
        activations: [row, width].
        truth: [row, feature] how active each feature is, mostly 0.
    """

    directions: Float[Tensor, "feature width"]
    activations: Float[Tensor, "row width"]
    truth: Float[Tensor, "row feature"]


@checked
def planted_features(
    n_rows: Count,
    *,
    n_features: Count = 32,
    width: Count = 16,
    active: Positive = 2.0,
    noise: Annotated[float, Ge(0)] = 0.02,
    seed: Seed = 0,
    split: Amount = 0,
) -> PlantedFeatures:
    """More features than dimensions, a few of them active at a time.

    It answers whether a dictionary finds directions that are there. What can mislead: real
    activations need not be sums of sparse features at all; a dictionary that is right here has
    only shown that it finds them where they are.

    Args:
        n_rows: activations.
        n_features: directions, drawn at random on the sphere.
        width: dimensions.
        active: features active at once, on average; frequencies fall from feature to feature by
            a factor of 4 over all of them.
        noise: standard deviation of what is added to every dimension.
        seed: of the directions.
        split: of the rows: other splits are other rows of the same features.

    Raises:
        ArgumentError: more than half of the features active at once.

    Source: the toy models of Elhage et al. 2022 (arXiv 2209.10652) and Sharkey et al. 2022.

    Example:
        >>> planted_features(100, n_features=8, width=4).truth.shape
        torch.Size([100, 8])
    """
    if active > n_features / 2:
        raise ArgumentError(f"expected active in 0..{n_features / 2:g}, got {active}")
    fixed = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, width, generator=fixed)
    directions = torch.nn.functional.normalize(directions, dim=1)
    frequency = 4.0 ** -torch.linspace(0, 1, n_features)
    frequency = frequency * active / frequency.sum()
    drawn = torch.Generator().manual_seed(1 + seed + 1_000_003 * (split + 1))
    there = torch.rand(n_rows, n_features, generator=drawn) < frequency
    size = torch.empty(n_rows, n_features).uniform_(0.5, 1.5, generator=drawn)
    truth = torch.where(there, size, 0.0)
    rows = truth @ directions + noise * torch.randn(n_rows, width, generator=drawn)
    return PlantedFeatures(directions, rows, truth)
