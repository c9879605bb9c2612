"""Positions that are variables (iTransformer), and heads that read every position by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError
from tstlens.model.families.revin import put_back, refuse_mask
from tstlens.model.mlp import ACTIVATIONS
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Output, Residual, Series


@dataclass(frozen=True)
class InvertedConfig:
    """A linear map of each channel's whole series: a position is a channel, not a time.

    Args:
        n_channels: channels of a series, and so positions.
        n_marks: of these, time marks (covariates): the last channels, which are not scaled and get
            no forecast.
        normalise: take mean and ``sqrt(var + eps)`` out of each channel.
        scale_eps: eps of the scaling.
        positions_are: always ``"channel"``.
    """

    n_channels: int
    n_marks: int = 0
    normalise: bool = True
    scale_eps: float = 1e-5
    positions_are: Literal["channel"] = "channel"
    kind: str = "inverted"

    def __post_init__(self) -> None:
        positive("InvertedConfig", n_channels=self.n_channels)
        if not 0 <= self.n_marks < self.n_channels:
            raise ArgumentError(
                f"InvertedConfig.n_marks must leave a channel to forecast: expected "
                f"0..{self.n_channels - 1}, got {self.n_marks}"
            )
        one_of("InvertedConfig.positions_are", self.positions_are, ("channel",))

    @property
    def n_targets(self) -> int:
        """Channels that are no time marks."""
        return self.n_channels - self.n_marks

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        if cfg.n_channels != self.n_channels:
            raise ArgumentError(
                f"the front end has n_channels={self.n_channels}, the model {cfg.n_channels}"
            )
        if cfg.n_time is None:
            raise ArgumentError("an inverted front end needs n_time: its map takes whole series")
        return Inverted(self, cfg.n_time, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """The channels, whatever the length."""
        return self.n_channels

    def time_span(self, pos: int, n_time: int) -> slice:
        """The whole series: that is what a position was embedded from."""
        return slice(0, n_time)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The whole series."""
        return slice(0, n_time)


class Inverted(nn.Module):
    """Map every channel's series linearly; ``W_E`` is [time, d_model]."""

    def __init__(self, part: InvertedConfig, n_time: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(n_time, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model))
        if part.normalise:
            self.hook_loc = HookPoint()  # [batch, channel, 1]
            self.hook_scale = HookPoint()  # [batch, channel, 1]
            self.hook_scaled = HookPoint()  # [batch, channel, time]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        refuse_mask(mask)
        statistics: dict[str, Tensor] = {}
        if self.cfg.normalise:
            n_targets = self.cfg.n_targets
            targets = series[:, :n_targets]
            loc = self.hook_loc(targets.mean(2, keepdim=True))
            variance = (targets - loc).var(2, keepdim=True, unbiased=False)
            scale = self.hook_scale((variance + self.cfg.scale_eps).sqrt())
            scaled = self.hook_scaled((targets - loc) / scale)
            series = torch.cat([scaled, series[:, n_targets:]], 1)
            statistics = {"loc": loc, "scale": scale}
        return series @ self.W_E + self.b_E, TrunkState(statistics=statistics)


@dataclass(frozen=True)
class PositionHeadConfig:
    """One linear map of every position by itself, after an activation.

    Args:
        horizon: steps of the output in every channel: the linear map's outputs where positions are
            channels, the positions where they are steps in time (a reconstruction).
        positions_are: ``"channel"`` (iTransformer) or ``"time"`` (mvts' reconstruction).
        n_quantiles: outputs per step, [batch, channel, horizon, quantile]; None for one.
        n_marks: positions at the end that get no output.
        act_fn: before the map; None for none.
        denormalise: put back the location and scale that the front end took out.
        bias: whether the linear map has a bias.
    """

    horizon: int
    positions_are: Literal["channel", "time"] = "channel"
    n_quantiles: int | None = None
    n_marks: int = 0
    act_fn: ActFn | None = None
    denormalise: bool = False
    bias: bool = True
    pooling: Literal["none"] = "none"
    kind: str = "position-head"

    def __post_init__(self) -> None:
        positive("PositionHeadConfig", horizon=self.horizon)
        one_of("PositionHeadConfig.positions_are", self.positions_are, ("channel", "time"))
        if self.n_quantiles is not None:
            positive("PositionHeadConfig", n_quantiles=self.n_quantiles)
        if self.positions_are == "time" and (self.n_quantiles or self.n_marks or self.denormalise):
            raise ArgumentError(
                "PositionHeadConfig: n_quantiles, n_marks and denormalise are for positions that "
                "are channels"
            )
        if self.act_fn is not None:
            one_of("PositionHeadConfig.act_fn", self.act_fn, ("relu", "gelu", "gelu_tanh", "silu"))

    @property
    def n_classes(self) -> None:
        """None: this is no classifier."""
        return None

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PositionHead(cfg, self)


class PositionHead(nn.Module):
    """From the stream [row, pos, d_model] to [batch, channel, horizon]; ``W_U`` [d_model, out]."""

    def __init__(self, cfg: Any, head: PositionHeadConfig) -> None:
        super().__init__()
        self.cfg = head
        inverted = head.positions_are == "channel"
        d_out = head.horizon * (head.n_quantiles or 1) if inverted else cfg.n_channels
        self.W_U = nn.Parameter(torch.zeros(cfg.d_model, d_out))
        self.b_U = nn.Parameter(torch.zeros(d_out), requires_grad=head.bias)
        self.hook_read = HookPoint()  # [row, pos, d_model]
        if head.denormalise:
            self.hook_scaled = HookPoint()  # [batch, channel, horizon * quantile]

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        head = self.cfg
        if head.n_marks:
            residual = residual[:, : -head.n_marks]
        if head.act_fn is not None:
            residual = ACTIVATIONS[head.act_fn](residual)
        output = self.hook_read(residual.contiguous()) @ self.W_U + self.b_U
        if head.positions_are == "time":
            return output.transpose(1, 2)
        if head.denormalise:
            output = self.hook_scaled(output)
            rows = {name: x.flatten(0, 1) for name, x in state.statistics.items()}
            output = put_back(output.flatten(0, 1), rows).view_as(output)
        return output if head.n_quantiles is None else output.unflatten(2, (-1, head.n_quantiles))
