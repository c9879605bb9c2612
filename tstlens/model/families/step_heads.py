"""Heads over the decoder's steps: parameters of a distribution, or the stream itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError
from tstlens.model.families.distributions import PARAMETERS, Distribution, domain, rescale
from tstlens.model.parts import one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Output, Residual


@dataclass(frozen=True)
class StepParametersConfig:
    """The parameters of a distribution for every step and target, in the series' units.

    The output is [batch, target, step, parameter], in the order of ``parameters``
    (``patching.quantile_loss`` takes it).

    Args:
        horizon: most steps.
        n_targets: channels that are forecast.
        distribution: whose parameters.
        statistics: what the front end takes out: ``"loc"``, ``"scale"``, both or none.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    horizon: int
    n_targets: int = 1
    distribution: Distribution = "student_t"
    statistics: tuple[str, ...] = ("scale",)
    kind: str = "step-parameters"

    n_classes = None
    pooling = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", tuple(self.statistics))
        positive("StepParametersConfig", horizon=self.horizon, n_targets=self.n_targets)
        one_of("distribution", self.distribution, tuple(PARAMETERS))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the distribution's parameters."""
        return PARAMETERS[self.distribution]

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return StepParameters(self, cfg.d_model)


class StepParameters(nn.Module):
    """``residual W_U + b_U`` at every step; ``W_U`` is [d_model, parameter * target]."""

    def __init__(self, head: StepParametersConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = head
        n_out = len(head.parameters) * head.n_targets
        self.W_U = nn.Parameter(torch.zeros(d_model, n_out))
        self.b_U = nn.Parameter(torch.zeros(n_out))
        self.hook_parameters = HookPoint()  # [batch, target, step, parameter], of scaled values

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        head = self.cfg
        raw = residual @ self.W_U + self.b_U  # [batch, step, parameter * target]
        raw = raw.unflatten(2, (len(head.parameters), head.n_targets)).permute(0, 3, 1, 2)
        parameters = self.hook_parameters(domain(head.distribution, raw))
        given: dict[str, Tensor] = {}
        for name in head.statistics:
            if name not in state.statistics:
                raise ArgumentError(
                    f"this head puts the series' {name} back, which the front end took out; pass "
                    "the state= that embed_series returned with the residual stream"
                )
            given[name] = state.statistics[name]  # [batch, target, 1]
        return rescale(head.distribution, parameters, given.get("loc"), given.get("scale"))


@dataclass(frozen=True)
class StepStreamConfig:
    """No head: the output is what leaves the last block, [batch, step, d_model]."""

    kind: str = "step-stream"

    n_classes = None
    horizon = None
    pooling = None

    def build(self, cfg: Any) -> nn.Module:
        """The module, which has no weights."""
        return StepStream()


class StepStream(nn.Module):
    """The stream as it is."""

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        return residual
