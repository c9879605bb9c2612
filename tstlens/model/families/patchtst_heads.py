"""PatchTST's heads (Hugging Face's form): forecasts, regression, patches, the stream itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError
from tstlens.model.families.distributions import (
    PARAMETERS,
    Distribution,
    domain,
    rescale,
)
from tstlens.model.heads import pool
from tstlens.model.parts import one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Output, Residual

Pooling = Literal["max", "mean", "first", "flatten"]
_POOLINGS = ("max", "mean", "first", "flatten")


@dataclass(frozen=True)
class PatchTSTForecastConfig:
    """Pool every channel's positions, one linear map, then scale and mean put back.

    Args:
        horizon: steps of a forecast.
        pooling: over positions; ``"first"`` is the CLS token.
        distribution: None for a forecast [batch, channel, horizon]; else its parameters,
            [batch, channel, horizon, parameter] in the order of ``parameters``, in the series'
            units (``patching.quantile_loss`` takes them).
        statistics: what the front end takes out: ``"loc"``, ``"scale"``, both or none.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    horizon: int
    pooling: Pooling = "flatten"
    distribution: Distribution | None = None
    statistics: tuple[str, ...] = ("loc", "scale")
    kind: str = "patchtst-forecast"

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", tuple(self.statistics))
        positive("PatchTSTForecastConfig", horizon=self.horizon)
        one_of("PatchTSTForecastConfig.pooling", self.pooling, _POOLINGS)
        if self.distribution is not None:
            one_of("distribution", self.distribution, tuple(PARAMETERS))

    @property
    def n_classes(self) -> None:
        """None: this is no classifier."""
        return None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the distribution's parameters; empty without one."""
        return PARAMETERS[self.distribution] if self.distribution else ()

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTForecast(self, cfg)


class PatchTSTForecast(nn.Module):
    """``pooled W_U + b_U`` in scaled units, then in the series' units.

    ``W_U`` is [d_pooled, horizon], or [d_pooled, parameter * horizon] of a distribution. What the
    head says in scaled units is at ``hook_scaled`` [batch, channel, horizon], or with a
    distribution at ``hook_parameters`` [batch, channel, horizon, parameter].
    """

    def __init__(self, head: PatchTSTForecastConfig, cfg: Any) -> None:
        super().__init__()
        self.cfg = head
        self.n_channels = cfg.n_channels
        d_in = cfg.d_model * (cfg.n_ctx if head.pooling == "flatten" else 1)
        self.n_parameters = len(head.parameters) or 1
        self.W_U = nn.Parameter(torch.zeros(d_in, self.n_parameters * head.horizon))
        self.b_U = nn.Parameter(torch.zeros(self.n_parameters * head.horizon))
        self.hook_pooled = HookPoint()  # [row, d_pooled]
        if head.distribution is None:
            self.hook_scaled = HookPoint()  # [batch, channel, horizon]
        else:
            self.hook_parameters = HookPoint()  # [batch, channel, horizon, parameter]

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        pooled = self.hook_pooled(pool(residual, self.cfg.pooling, None))
        raw = torch.addmm(self.b_U, pooled, self.W_U)  # [row, parameter * horizon]
        raw = raw.unflatten(0, (-1, self.n_channels))
        given = {
            name: _statistic(state, name).unflatten(0, (-1, self.n_channels))  # [batch, channel, 1]
            for name in self.cfg.statistics
        }
        distribution = self.cfg.distribution
        if distribution is not None:
            raw = raw.unflatten(2, (self.n_parameters, -1)).transpose(2, 3)
            parameters = self.hook_parameters(domain(distribution, raw))
            return rescale(distribution, parameters, given.get("loc"), given.get("scale"))
        forecast = self.hook_scaled(raw)
        if "scale" in given:
            forecast = forecast * given["scale"]
        return forecast + given["loc"] if "loc" in given else forecast


@dataclass(frozen=True)
class PatchTSTRegressionConfig:
    """Pool every channel's positions, put the channels side by side, one linear map.

    Args:
        n_targets: numbers per series; the output is [batch, target].
        pooling: over positions; ``"first"`` is the CLS token.
        output_range: the least and the largest value of an output (a sigmoid between them), or
            None.
        distribution: None, or the distribution whose parameters are the output, [batch, target,
            parameter].

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    n_targets: int
    pooling: Pooling = "mean"
    output_range: tuple[float, float] | None = None
    distribution: Distribution | None = None
    kind: str = "patchtst-regression"

    def __post_init__(self) -> None:
        positive("PatchTSTRegressionConfig", n_targets=self.n_targets)
        one_of("PatchTSTRegressionConfig.pooling", self.pooling, _POOLINGS[:3])
        if self.distribution is not None:
            one_of("distribution", self.distribution, tuple(PARAMETERS))
        if self.output_range is not None:
            object.__setattr__(self, "output_range", tuple(self.output_range))
            if len(self.output_range) != 2:
                raise ArgumentError(f"output_range must be two numbers, got {self.output_range}")

    @property
    def n_classes(self) -> None:
        """None: this is no classifier."""
        return None

    @property
    def horizon(self) -> None:
        """None: this is no forecast."""
        return None

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTRegression(self, cfg)


class PatchTSTRegression(nn.Module):
    """``W_U`` is [channel * d_model, target], or [..., parameter * target] of a distribution."""

    def __init__(self, head: PatchTSTRegressionConfig, cfg: Any) -> None:
        super().__init__()
        self.cfg = head
        self.n_channels = cfg.n_channels
        self.n_parameters = len(PARAMETERS[head.distribution]) if head.distribution else 1
        d_out = self.n_parameters * head.n_targets
        self.W_U = nn.Parameter(torch.zeros(cfg.n_channels * cfg.d_model, d_out))
        self.b_U = nn.Parameter(torch.zeros(d_out))
        self.hook_pooled = HookPoint()  # [row, d_model]

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        pooled = self.hook_pooled(pool(residual, self.cfg.pooling, None))
        pooled = pooled.reshape(-1, self.n_channels * pooled.shape[1])
        out = torch.addmm(self.b_U, pooled, self.W_U)  # [batch, parameter * target]
        if self.cfg.distribution is not None:
            raw = out.unflatten(1, (self.n_parameters, -1)).transpose(1, 2)
            return domain(self.cfg.distribution, raw)
        if self.cfg.output_range is not None:
            low, high = self.cfg.output_range
            out = out.sigmoid() * (high - low) + low
        return out


@dataclass(frozen=True)
class PatchTSTPatchesConfig:
    """Every patch's samples from its position, [batch, channel, patch, patch_len], scaled.

    Args:
        patch_len: samples in one patch.
        cls_token: whether the first position is a token of its own, which is left out.
    """

    patch_len: int
    cls_token: bool = False
    kind: str = "patchtst-patches"

    n_classes = None
    horizon = None
    pooling = None

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTPatches(self, cfg)


class PatchTSTPatches(nn.Module):
    """The pretraining head: ``W_U`` is [d_model, patch_len].

    Its output is in units of the scaled series, as the source's loss compares it.
    """

    def __init__(self, head: PatchTSTPatchesConfig, cfg: Any) -> None:
        super().__init__()
        self.cfg = head
        self.n_channels = cfg.n_channels
        self.W_U = nn.Parameter(torch.zeros(cfg.d_model, head.patch_len))
        self.b_U = nn.Parameter(torch.zeros(head.patch_len))

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        patches = residual[:, int(self.cfg.cls_token) :]  # [row, patch, d_model]
        return (patches @ self.W_U + self.b_U).unflatten(0, (-1, self.n_channels))


@dataclass(frozen=True)
class PatchTSTStreamConfig:
    """No head: the output is what leaves the last block, [batch, channel, pos, d_model]."""

    kind: str = "patchtst-stream"

    n_classes = None
    horizon = None
    pooling = None

    def build(self, cfg: Any) -> nn.Module:
        """The module, which has no weights."""
        return PatchTSTStream(cfg.n_channels)


class PatchTSTStream(nn.Module):
    """Rows of the trunk as [batch, channel, ...]."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.n_channels = n_channels

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        return residual.unflatten(0, (-1, self.n_channels))


def _statistic(state: TrunkState, name: str) -> Tensor:
    if name not in state.statistics:
        raise ArgumentError(
            f"this head puts the series' {name} back, which the front end took out; pass the "
            "state= that embed_series returned with the residual stream"
        )
    return state.statistics[name]
