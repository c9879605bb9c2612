"""Heads over the whole stream: activation, flatten or pool, linear map, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model.families.revin import put_back
from tstlens.model.mlp import ACTIVATIONS
from tstlens.model.norms import BatchNorm
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Output, Residual

_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class FlatHeadConfig:
    """Zero at padding, activation, pool or flatten, linear map, and what the source does after it.

    Args:
        n_classes: outputs of a classifier or a regressor, or None for a forecaster.
        horizon: steps of a forecast in every channel, or None.
        n_quantiles: outputs per step of a forecast, [batch, channel, horizon, quantile]; None for
            one, without that axis.
        pooling: ``"flatten"`` (position-major), ``"mean"`` or ``"max_mean"`` (side by side) over
            all positions, padded ones counting as zeros.
        act_fn: before pooling; None for none.
        batch_norm: a batch norm between the pooled vector and the linear map.
        eps: of that norm.
        individual: a linear map of its own for each channel (channel-independent forecasters).
        output_range: low and high of ``sigmoid(y) * (high - low) + low``; None for no sigmoid.
        denormalise: put back the location and scale that the front end took out.
        bias: whether the linear map has a bias.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    n_classes: int | None = None
    horizon: int | None = None
    n_quantiles: int | None = None
    pooling: Literal["flatten", "mean", "max_mean"] = "flatten"
    act_fn: ActFn | None = None
    batch_norm: bool = False
    eps: float = 1e-5
    individual: bool = False
    output_range: tuple[float | int, float | int] | None = None
    denormalise: bool = False
    bias: bool = True
    kind: str = "flat-head"

    def __post_init__(self) -> None:
        one_of("FlatHeadConfig.pooling", self.pooling, ("flatten", "mean", "max_mean"))
        if self.act_fn is not None:
            one_of("FlatHeadConfig.act_fn", self.act_fn, _ACTIVATIONS)
        if (self.n_classes is None) == (self.horizon is None):
            raise ArgumentError(
                "a head gives either classes or a horizon: set exactly one of n_classes and "
                f"horizon, got n_classes={self.n_classes}, horizon={self.horizon}"
            )
        for name in ("n_classes", "horizon", "n_quantiles"):
            if getattr(self, name) is not None:
                positive("FlatHeadConfig", **{name: getattr(self, name)})
        for name in ("n_quantiles", "individual", "denormalise"):
            if getattr(self, name) and self.horizon is None:
                raise ArgumentError(f"FlatHeadConfig.{name} is for forecasters: set horizon")
        if self.output_range is not None:
            object.__setattr__(self, "output_range", tuple(self.output_range))

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return FlatHead(cfg, self)


class FlatHead(nn.Module):
    """From the stream to classes [batch, class] or a forecast [batch, channel, horizon].

    ``W_U`` is [pooled, output], or [channel, pooled, output] where every channel has its own;
    flattened rows are position-major. Channels of a classifier that go through the trunk one by
    one stand side by side, channel-major.
    """

    def __init__(self, cfg: Any, head: FlatHeadConfig) -> None:
        super().__init__()
        self.cfg = head
        self.n_ctx = cfg.n_ctx
        self.n_channels = cfg.n_channels or 1
        self.channel_independent = cfg.channel_independent
        if head.horizon is not None and not cfg.channel_independent:
            raise ArgumentError("FlatHeadConfig forecasts need a channel-independent front end")
        d_in = cfg.d_model * {"flatten": cfg.n_ctx or 1, "mean": 1, "max_mean": 2}[head.pooling]
        if head.n_classes is not None and cfg.channel_independent:
            d_in *= self.n_channels
        d_out = head.n_classes or (head.horizon or 0) * (head.n_quantiles or 1)
        own = (self.n_channels,) if head.individual else ()
        self.W_U = nn.Parameter(torch.zeros(*own, d_in, d_out))
        self.b_U = nn.Parameter(torch.zeros(*own, d_out), requires_grad=head.bias)
        if head.batch_norm:
            self.norm = BatchNorm(d_in, head.eps)
        self.hook_pooled = HookPoint()  # [row, pooled]
        if head.denormalise:
            self.hook_scaled = HookPoint()  # [row, horizon * quantile]

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        head = self.cfg
        if head.pooling == "flatten" and residual.shape[1] != self.n_ctx:
            raise SeriesShapeError(
                f"a flatten head takes exactly {self.n_ctx} positions, got {residual.shape[1]}"
            )
        if state.pos_mask is not None:
            residual = residual * state.pos_mask[:, :, None]
        if head.act_fn is not None:
            residual = ACTIVATIONS[head.act_fn](residual)
        pooled = self.hook_pooled(self._pool(residual))
        if head.n_classes is not None and self.channel_independent:
            pooled = pooled.unflatten(0, (-1, self.n_channels)).flatten(1)
        if head.batch_norm:
            pooled = self.norm(pooled)
        output = self._map(pooled)
        if head.output_range is not None:
            low, high = head.output_range
            output = torch.sigmoid(output) * (high - low) + low
        if head.horizon is None:
            return output
        if head.denormalise:
            output = put_back(self.hook_scaled(output), state.statistics)
        steps = (head.horizon,) if head.n_quantiles is None else (head.horizon, head.n_quantiles)
        return output.view(-1, self.n_channels, *steps)

    def _pool(self, residual: Residual) -> Tensor:
        if self.cfg.pooling == "flatten":
            return residual.flatten(1)
        mean = residual.mean(1)
        return mean if self.cfg.pooling == "mean" else torch.cat([residual.amax(1), mean], 1)

    def _map(self, pooled: Tensor) -> Tensor:
        if not self.cfg.individual:
            return torch.addmm(self.b_U, pooled, self.W_U)
        by_channel = pooled.unflatten(0, (-1, self.n_channels)).transpose(0, 1)
        return (by_channel @ self.W_U + self.b_U[:, None]).transpose(0, 1).flatten(0, 1)
