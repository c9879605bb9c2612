"""Location and scale of each channel from its observed samples, with gradients that stay finite."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mean_and_std(
    series: Float[Tensor, "*row time"], observed: Bool[Tensor, "*row time"]
) -> tuple[Float[Tensor, "*row 1"], Float[Tensor, "*row 1"]]:
    """Mean and uncorrected standard deviation over the observed samples of every row.

    Summed as ``torch.nanmean`` sums, which the sources use: where a series is constant, what is
    left of rounding is divided by a scale near zero, and any other order would show. Both are NaN
    where a row has no observed sample.

    Args:
        series: values; those that are not observed may be anything.
        observed: True where a sample counts.
    """
    mean = torch.where(observed, series, torch.nan).nanmean(-1, keepdim=True)
    # The square is taken of zeros where nothing was observed: the gradient of NaN is NaN.
    square = torch.where(observed, series - mean, 0.0).square()
    variance = torch.where(observed, square, torch.nan).nanmean(-1, keepdim=True)
    flat = variance == 0  # the root has no gradient there
    root = torch.where(flat, torch.ones_like(variance), variance).sqrt()
    return mean, torch.where(flat, torch.zeros_like(root), root)
