"""Metrics: from a model's output to one number per series.

Probabilities saturate: where the model is nearly certain a large change of the logits hardly moves
them. Log-probabilities and logit differences do not, so look at both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from tstlens.arguments import check_slice, checked
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, SeriesValueError
from tstlens.metrics import ANY, Metric
from tstlens.model.families.distributions import PARAMETERS, Distribution, quantiles_of

__all__ = ["Metric", "log_prob", "logit", "logit_diff", "mse", "prob", "quantile_loss"]


@checked
def prob(target: Int[Tensor, " pair"]) -> Metric:
    """Probability of the target class, between 0 and 1.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("probability", "probability", target, softmax, (0.0, 1.0))


@checked
def log_prob(target: Int[Tensor, " pair"]) -> Metric:
    """Log-probability of the target class, in nats.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("log-probability", "nats", target, log_softmax, (-math.inf, 0.0))


@checked
def logit(target: Int[Tensor, " pair"]) -> Metric:
    """Logit of the target class.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("logit", "logit", target, None)


@checked
def logit_diff(target: Int[Tensor, " pair"], other: Int[Tensor, " pair"]) -> Metric:
    """Logit of the target class minus that of another one.

    Args:
        target: int [pair], indices of the model's logits.
        other: int [pair], the class it competes with (what the corrupted run predicts, say).

    Raises:
        LabelError: target and other have different lengths.
    """
    if target.shape != other.shape:
        raise LabelError(
            f"expected as many other classes as targets {list(target.shape)}, "
            f"got {list(other.shape)}"
        )
    _check_targets(target)
    _check_targets(other)
    return Metric("logit difference", "logit", _logit_difference, (target, other), "higher")


@checked
def mse(
    reference: Float[Tensor, "pair channel horizon"],
    horizon: slice | int | None = None,
    channel: slice | int | None = None,
) -> Metric:
    """Mean squared error of a forecast, in squared units of the output (lower is better).

    Args:
        reference: what the forecast is compared with, [pair, channel, horizon]: true values, or
            the clean run's forecast.
        horizon: steps that count; None for all.
        channel: channels that count; None for all.

    Raises:
        SeriesShapeError: the reference has other axes than a forecast.
    """
    _check_reference(reference)
    steps = _as_slice(horizon, reference.shape[2], "horizon")
    channels = _as_slice(channel, reference.shape[1], "channel")

    measure = _SquaredError(channels, steps)
    return Metric(
        "mean squared error", "squared units", measure, (reference,), "lower", (0.0, math.inf)
    )


@checked
def quantile_loss(
    reference: Float[Tensor, "pair channel horizon"],
    levels: Sequence[float],
    horizon: slice | int | None = None,
    channel: slice | int | None = None,
    level: float | None = None,
    distribution: Distribution | None = None,
) -> Metric:
    """Mean pinball loss of a forecast's quantiles, in units of the output (lower is better).

    For a quantile at level q it is ``q (y - f)`` where the truth y lies above the forecast f, and
    ``(1 - q)(f - y)`` below it; its expectation is least at the true quantile. At level 0.5 it is
    half the absolute error. It says nothing about levels that are not given.

    Args:
        reference: true values, [pair, channel, horizon].
        levels: of the output's quantiles, in the order of its last axis (of a model that gives
            quantiles), or those to take from its distribution.
        horizon: steps that count; None for all.
        channel: channels that count; None for all.
        level: the one of ``levels`` that counts; None for the mean over all.
        distribution: ``"normal"`` or ``"student_t"`` where the output is a distribution's
            parameters [pair, channel, horizon, parameter]; None where it is quantiles.

    Raises:
        SeriesShapeError: the reference has other axes than a forecast, or the output others than
            one quantile (or parameter) per step.
        ArgumentError: levels that are none, or that the distribution has no quantiles for.

    Source: Koenker and Bassett 1978, "Regression quantiles".

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> metric = patching.quantile_loss(torch.zeros(1, 1, 2), levels=(0.1, 0.9))
        >>> metric(torch.tensor([[[[-1.0, 1.0], [-1.0, 2.0]]]]))
        tensor([0.1250])
    """
    _check_reference(reference)
    steps = _as_slice(horizon, reference.shape[2], "horizon")
    channels = _as_slice(channel, reference.shape[1], "channel")
    levels = tuple(levels)
    if not levels or not all(0 < entry < 1 for entry in levels):
        raise ArgumentError(f"levels must lie between 0 and 1, at least one, got {levels}")
    if level is not None and level not in levels:
        raise ArgumentError(f"level must be one of {levels}, got {level}")
    if distribution is not None and distribution not in ("normal", "student_t"):
        raise ArgumentError(
            f"quantiles are taken from a normal or student_t distribution, got {distribution!r}"
        )
    measure = _Pinball(channels, steps, levels, level, distribution)
    name = "quantile loss" if level is None else f"quantile loss at level {level:g}"
    return Metric(name, "units", measure, (reference,), "lower", (0.0, math.inf))


@dataclass(frozen=True)
class _SquaredError:
    """Mean squared error [*world, pair] over some channels and steps."""

    channels: slice
    steps: slice

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        if output.shape[-3:] != reference.shape:
            raise SeriesShapeError(
                f"expected forecasts like the reference {list(reference.shape)}, "
                f"got {list(output.shape[-3:])}"
            )
        error = (output - reference.to(output)) ** 2
        return error[..., self.channels, self.steps].flatten(-2).mean(-1)


@dataclass(frozen=True)
class _Pinball:
    """Mean pinball loss [*world, pair] over some channels, steps and levels."""

    channels: slice
    steps: slice
    levels: tuple[float, ...]
    level: float | None
    distribution: Distribution | None

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        of = self.distribution
        n_last = len(PARAMETERS[of]) if of else len(self.levels)
        expected = (*reference.shape, n_last)
        if output.shape[-4:] != expected:
            raise SeriesShapeError(
                f"expected {'parameters' if of else 'quantiles'} [pair, channel, horizon, "
                f"{n_last}] = {list(expected)}, got {list(output.shape[-4:])}"
            )
        output = output[..., self.channels, self.steps, :]
        quantiles = quantiles_of(of, output, self.levels) if of else output
        error = reference[:, self.channels, self.steps, None].to(output) - quantiles
        at = torch.tensor(self.levels).to(output)
        loss = torch.maximum(at * error, (at - 1) * error)
        loss = loss if self.level is None else loss[..., [self.levels.index(self.level)]]
        return loss.flatten(-3).mean(-1)


def _logit_difference(output: Tensor, target: Tensor, other: Tensor) -> Tensor:
    return _class_value(output, target) - _class_value(output, other)


def _class_value(
    output: Tensor, target: Tensor, transform: Callable[..., Tensor] | None = None
) -> Tensor:
    if output.ndim < 2 or output.shape[-2] != len(target):
        raise SeriesShapeError(
            f"expected logits of {len(target)} series, one per target, got {list(output.shape)}"
        )
    n_classes = output.shape[-1]
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < n_classes:
        bad = target[(target < 0) | (target >= n_classes)][0]
        raise LabelError(f"expected targets in 0..{n_classes - 1}, got {int(bad)}")
    index = target.to(output.device).long().expand(output.shape[:-1]).unsqueeze(-1)
    values = output if transform is None else transform(output, dim=-1)
    return values.gather(-1, index).squeeze(-1)


def _check_reference(reference: Tensor) -> None:
    if reference.ndim != 3:
        raise SeriesShapeError(
            f"expected a reference [pair, channel, horizon], got {list(reference.shape)}"
        )
    if not bool(reference.isfinite().all()):
        raise SeriesValueError(
            "expected a finite reference, got NaN or infinity; choose the horizon that is known"
        )


def _as_slice(index: slice | int | None, size: int, axis: str) -> slice:
    if index is None:
        return slice(None)
    if isinstance(index, int):
        index = slice(index, index + 1) if index >= 0 else slice(index + size, index + size + 1)
    check_slice(index, size, axis)
    return index


def _of_class(
    name: str,
    unit: str,
    target: Tensor,
    transform: Callable[[Tensor, int], Tensor] | None,
    range: tuple[float, float] = ANY,
) -> Metric:
    _check_targets(target)
    name = f"{name} of the target class"
    return Metric(name, unit, _OfClass(transform), (target,), "higher", range)


def _check_targets(target: Tensor) -> None:
    if target.ndim != 1 or target.is_floating_point() or target.dtype == torch.bool:
        raise LabelError(
            f"expected targets as integers [pair], got {target.dtype} {list(target.shape)}"
        )


@dataclass(frozen=True)
class _OfClass:
    """The target's entry [*world, pair] of the logits, or of what they are turned into."""

    transform: Callable[[Tensor, int], Tensor] | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[-2] != len(target):
            raise SeriesShapeError(
                f"expected logits of {len(target)} series, one per target, got {list(output.shape)}"
            )
        n_classes = output.shape[-1]
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < n_classes:
            bad = target[(target < 0) | (target >= n_classes)][0]
            raise LabelError(f"expected targets in 0..{n_classes - 1}, got {int(bad)}")
        index = target.to(output.device).long().expand(output.shape[:-1]).unsqueeze(-1)
        values = output if self.transform is None else self.transform(output, -1)
        return values.gather(-1, index).squeeze(-1)


def _logit_difference(output: Tensor, target: Tensor, other: Tensor) -> Tensor:
    return _OfClass()(output, target) - _OfClass()(output, other)
