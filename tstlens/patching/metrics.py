"""Metrics: from a model's output to one number per series.

Probabilities saturate: where the model is nearly certain a large change of the logits hardly moves
them. Log-probabilities and logit differences do not, so look at both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from tstlens.arguments import check_slice, checked
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, SeriesValueError
from tstlens.model.families.distributions import PARAMETERS, Distribution, quantiles_of

Values = Float[Tensor, "*world pair"]


@dataclass(frozen=True)
class Metric:
    """A named function of the output with the targets it compares with.

    Args:
        name: what tables and figures call it.
        unit: ``"probability"``, ``"nats"``, ``"logit"``, ``"units"`` or ``"squared units"``.
        measure: ``measure(output, *targets)``, from outputs [*world, pair, ...] to values
            [*world, pair].
        targets: what each pair is compared with; the first axis of each is the pair.
    """

    name: str
    unit: str
    measure: Callable[..., Tensor]
    targets: tuple[Tensor, ...]

    def __call__(self, output: Float[Tensor, ...]) -> Values:
        """Values [*world, pair] of outputs [*world, pair, ...].

        Raises:
            SeriesShapeError: the outputs are for another number of pairs.
            LabelError: a target is outside the model's classes.
        """
        return self.measure(output, *self.targets)

    @checked
    def of_pairs(self, index: slice) -> Metric:
        """The same metric for some of the pairs."""
        return replace(self, targets=tuple(target[index] for target in self.targets))

    @property
    def n_pairs(self) -> int:
        """How many pairs the targets are for."""
        return len(self.targets[0])


@checked
def prob(target: Int[Tensor, " pair"]) -> Metric:
    """Probability of the target class, between 0 and 1.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("probability", "probability", target, softmax)


@checked
def log_prob(target: Int[Tensor, " pair"]) -> Metric:
    """Log-probability of the target class, in nats.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("log-probability", "nats", target, log_softmax)


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
    _check_classes(target)
    _check_classes(other)
    return Metric("logit difference", "logit", _logit_difference, (target, other))


@checked
def mse(
    reference: Float[Tensor, "pair channel horizon"],
    horizon: slice | int | None = None,
    channel: slice | int | None = None,
) -> Metric:
    """Mean squared error of a forecast, in squared units of the output (smaller is better).

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
    measure = partial(_squared_error, part=(channels, steps))
    return Metric("mean squared error", "squared units", measure, (reference,))


@checked
def quantile_loss(
    reference: Float[Tensor, "pair channel horizon"],
    levels: Sequence[float],
    horizon: slice | int | None = None,
    channel: slice | int | None = None,
    level: float | None = None,
    distribution: Distribution | None = None,
) -> Metric:
    """Mean pinball loss of a forecast's quantiles, in units of the output (smaller is better).

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
    measure = partial(
        _pinball, part=(channels, steps), levels=levels, level=level, distribution=distribution
    )
    name = "quantile loss" if level is None else f"quantile loss at level {level:g}"
    return Metric(name, "units", measure, (reference,))


# Functions of the module rather than closures, so that metrics can be pickled.


def _squared_error(output: Tensor, reference: Tensor, part: tuple[slice, slice]) -> Tensor:
    if output.shape[-3:] != reference.shape:
        raise SeriesShapeError(
            f"expected forecasts like the reference {list(reference.shape)}, "
            f"got {list(output.shape[-3:])}"
        )
    error = (output - reference.to(output)) ** 2
    return error[(..., *part)].flatten(-2).mean(-1)


def _pinball(
    output: Tensor,
    reference: Tensor,
    part: tuple[slice, slice],
    levels: tuple[float, ...],
    level: float | None,
    distribution: Distribution | None,
) -> Tensor:
    n_last = len(PARAMETERS[distribution]) if distribution else len(levels)
    expected = (*reference.shape, n_last)
    if output.shape[-4:] != expected:
        what = "parameters" if distribution else "quantiles"
        raise SeriesShapeError(
            f"expected {what} [pair, channel, horizon, {n_last}] = {list(expected)}, "
            f"got {list(output.shape[-4:])}"
        )
    output = output[(..., *part, slice(None))]
    quantiles = quantiles_of(distribution, output, levels) if distribution else output
    error = reference[(slice(None), *part, None)].to(output) - quantiles
    at = torch.tensor(levels).to(output)
    loss = torch.maximum(at * error, (at - 1) * error)
    loss = loss if level is None else loss[..., [levels.index(level)]]
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
    name: str, unit: str, target: Tensor, transform: Callable[..., Tensor] | None
) -> Metric:
    _check_classes(target)
    measure = partial(_class_value, transform=transform)
    return Metric(f"{name} of the target class", unit, measure, (target,))


def _check_classes(target: Tensor) -> None:
    if target.ndim != 1 or target.is_floating_point() or target.dtype == torch.bool:
        raise LabelError(
            f"expected targets as integers [pair], got {target.dtype} {list(target.shape)}"
        )
