"""Positions inside attention: T5's relative bias on the scores, rotations of queries and keys."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tstlens.shapes import PerHead


class RelativeBias(nn.Module):
    """A learned number per head for each bucket of ``key - query``, added to every layer's scores.

    Half of the buckets hold one distance each, the others grow logarithmically up to
    ``max_distance``; where attention runs both ways, half of them are for keys that come later.

    Source: Raffel et al. 2020, "Exploring the limits of transfer learning with a unified
    text-to-text transformer" (T5).
    """

    def __init__(self, n_heads: int, n_buckets: int, max_distance: int, causal: bool) -> None:
        super().__init__()
        self.n_buckets, self.max_distance, self.causal = n_buckets, max_distance, causal
        self.weight = nn.Parameter(torch.zeros(n_buckets, n_heads))

    def forward(self, n_pos: int) -> Float[Tensor, "1 head query key"]:
        pos = torch.arange(n_pos, device=self.weight.device)
        bucket = self.bucket(pos[None, :] - pos[:, None])
        return self.weight[bucket].permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of every ``key - query``."""
        n_buckets = self.n_buckets
        if self.causal:
            first, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
        else:
            n_buckets //= 2
            first, distance = (distance > 0).long() * n_buckets, distance.abs()
        exact = n_buckets // 2
        ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(
            self.max_distance / exact
        )
        far = (exact + (ratio * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
        return first + torch.where(distance < exact, distance, far)


def rotate(x: PerHead, positions: Tensor | None, base: float) -> PerHead:
    """Turn dimension pairs ``(i, i + d_head / 2)`` of every head by ``position * base^(-2i/d)``.

    Args:
        x: [row, pos, head, d_head].
        positions: int [row, pos]; None counts from 0.
        base: of the wavelengths.

    Source: Su et al. 2021, "RoFormer", in the layout of Hugging Face's models.
    """
    half = x.shape[-1] // 2
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)[None]
    power = torch.arange(0, 2 * half, 2, device=x.device, dtype=torch.float32) / (2 * half)
    rate = 1.0 / base**power
    angle = positions[:, :, None, None].float() * rate  # [row, pos, 1, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
