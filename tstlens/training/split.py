"""Stratified splits: part of a training split set aside to choose with."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from tstlens.arguments import Seed, checked
from tstlens.errors import ArgumentError, LabelError
from tstlens.shapes import Labels


@checked
def stratified_split(
    labels: Labels, fraction: float, seed: Seed = 0
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Indices of the series to train on and of those held out, every class in proportion.

    A class with at least two series has at least one on each side; a class with a single
    series stays whole in the part trained on.

    Args:
        labels: [batch], one label per series.
        fraction: of each class to hold out, between 0 and 1.
        seed: of the shuffle within each class.

    Returns:
        Two ascending, disjoint index tensors that together cover ``labels``.

    Raises:
        ArgumentError: a fraction outside 0 to 1, or too few series to hold any out.

    Example:
        >>> kept, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25)
        >>> len(kept), len(held)
        (6, 2)
    """
    _check_labels(labels)
    if not 0 < fraction < 1:
        raise ArgumentError(f"val_fraction: expected between 0 and 1, got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0].cpu()
        members = members[torch.randperm(len(members), generator=generator)]
        n_held = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:n_held])
        kept.append(members[n_held:])
    if not held or not sum(map(len, held)):
        raise ArgumentError(
            f"val_fraction: no class has two series, so none of the {len(labels)} can be held "
            "out; pass val=, or val_fraction=0 with select='last'"
        )
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


@checked
def stratified_folds(labels: Labels, n_folds: int, seed: Seed = 0) -> list[Int[Tensor, " held"]]:
    """Cut the series into disjoint folds with every class spread evenly over them.

    Args:
        labels: [batch], one label per series.
        n_folds: how many folds, from 2 to the number of series.
        seed: of the shuffle within each class.

    Returns:
        One ascending index tensor per fold.

    Raises:
        ArgumentError: a number of folds that is not possible.

    Example:
        >>> [fold.numel() for fold in stratified_folds(torch.tensor([0, 0, 0, 1, 1, 1]), 3)]
        [2, 2, 2]
    """
    _check_labels(labels)
    if not 2 <= n_folds <= len(labels):
        raise ArgumentError(
            f"n_folds: expected 2 to {len(labels)} (the number of series), got {n_folds}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0].cpu()
        order.append(members[torch.randperm(len(members), generator=generator)])
    dealt = torch.cat(order)
    return [dealt[first::n_folds].sort().values for first in range(n_folds)]


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point():
        raise LabelError(
            f"expected labels as integers [batch], got {labels.dtype} {list(labels.shape)}"
        )
