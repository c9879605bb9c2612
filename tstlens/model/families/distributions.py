"""Distributions that heads give the parameters of: their domains, units and quantiles.

Source: ``transformers.time_series_utils`` (``StudentTOutput``, ``NormalOutput``,
``NegativeBinomialOutput``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Distribution = Literal["student_t", "normal", "negative_binomial"]
PARAMETERS: dict[str, tuple[str, ...]] = {  # in the order of the output's last axis
    "student_t": ("df", "loc", "scale"),
    "normal": ("loc", "scale"),
    "negative_binomial": ("total_count", "logits"),
}
_Parameters = Float[Tensor, "*output parameter"]


def domain(kind: Distribution, raw: _Parameters) -> _Parameters:
    """Unbounded numbers as parameters: scale and count above 0, degrees of freedom above 2."""
    first, *rest = raw.unbind(-1)
    if kind == "negative_binomial":
        return torch.stack([_squareplus(first), *rest], -1)
    tiny = torch.finfo(raw.dtype).eps
    if kind == "normal":
        return torch.stack([first, _squareplus(rest[0]).clamp_min(tiny)], -1)
    loc, scale = rest
    return torch.stack([2.0 + _squareplus(first), loc, _squareplus(scale).clamp_min(tiny)], -1)


def _squareplus(x: Tensor) -> Tensor:
    return (x + (x.square() + 4.0).sqrt()) / 2.0


def rescale(
    kind: Distribution, parameters: _Parameters, loc: Tensor | None, scale: Tensor | None
) -> _Parameters:
    """The parameters in the series' units.

    Args:
        kind: the distribution.
        parameters: [batch, channel, horizon, parameter] in scaled units.
        loc: [batch, channel, 1], what was taken out of the series; None for 0. Counts are not
            shifted.
        scale: [batch, channel, 1]; None for 1.
    """
    if kind == "negative_binomial":
        count, logits = parameters.unbind(-1)
        return parameters if scale is None else torch.stack([count, logits + scale.log()], -1)
    *before, at, width = parameters.unbind(-1)
    if scale is not None:
        at, width = at * scale, width * scale
    if loc is not None:
        at = at + loc
    return torch.stack([*before, at, width], -1)


def quantiles_of(
    kind: Distribution, parameters: _Parameters, levels: Sequence[float]
) -> Float[Tensor, "*output quantile"]:
    """Quantiles of a normal or Student's t distribution, with gradients for all parameters."""
    *_, loc, scale = parameters.unbind(-1)
    level = torch.tensor(levels, dtype=parameters.dtype, device=parameters.device)
    if kind == "normal":
        standard = torch.special.ndtri(level).expand(*loc.shape, -1)
    else:
        standard = _StudentQuantile.apply(
            parameters[..., :1].expand(*loc.shape, len(levels)), level
        )
    return loc[..., None] + scale[..., None] * standard


class _StudentQuantile(torch.autograd.Function):
    """Quantiles of Student's t by SciPy; torch has none, and the gradient for df is numerical."""

    @staticmethod
    def forward(ctx: Any, df: Tensor, level: Tensor) -> Tensor:
        ctx.save_for_backward(df, level)
        return _student(df, level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        df, level = ctx.saved_tensors
        step = 1e-5 * df.double()
        slope = (_student(df.double() + step, level) - _student(df.double() - step, level)) / (
            2 * step
        )
        return grads[0] * slope.to(grads[0]), None


def _student(df: Tensor, level: Tensor) -> Tensor:
    from scipy.special import stdtrit

    at = stdtrit(df.detach().double().cpu().numpy(), level.detach().double().cpu().numpy())
    return torch.as_tensor(at).to(df)
