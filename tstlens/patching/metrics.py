"""Metrics: from a model's output to one number per series.

Probabilities saturate: where the model is nearly certain a large change of the logits hardly moves
them. Log-probabilities and logit differences do not, so look at both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

Values = Float[Tensor, "*world pair"]


@dataclass(frozen=True)
class Metric:
    """A named function of the output with the targets it compares with.

    Args:
        name: what tables and figures call it.
        unit: ``"probability"``, ``"nats"``, ``"logit"`` or ``"squared units"``.
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

    def of_pairs(self, index: slice) -> Metric:
        """The same metric for some of the pairs."""
        return replace(self, targets=tuple(target[index] for target in self.targets))

    @property
    def n_pairs(self) -> int:
        """How many pairs the targets are for."""
        return len(self.targets[0])


def prob(target: Int[Tensor, " pair"]) -> Metric:
    """Probability of the target class, between 0 and 1.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("probability", "probability", target, lambda out: out.softmax(-1))


def log_prob(target: Int[Tensor, " pair"]) -> Metric:
    """Log-probability of the target class, in nats.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("log-probability", "nats", target, lambda out: out.log_softmax(-1))


def logit(target: Int[Tensor, " pair"]) -> Metric:
    """Logit of the target class.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return _of_class("logit", "logit", target, lambda out: out)


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
    first, second = logit(target), logit(other)

    def measure(output: Tensor, target: Tensor, other: Tensor) -> Tensor:
        return first.measure(output, target) - second.measure(output, other)

    return Metric("logit difference", "logit", measure, (target, other))


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
    if reference.ndim != 3:
        raise SeriesShapeError(
            f"expected a reference [pair, channel, horizon], got {list(reference.shape)}"
        )
    steps = _as_slice(horizon, reference.shape[2], "horizon")
    channels = _as_slice(channel, reference.shape[1], "channel")

    def measure(output: Tensor, reference: Tensor) -> Tensor:
        if output.shape[-3:] != reference.shape:
            raise SeriesShapeError(
                f"expected forecasts like the reference {list(reference.shape)}, "
                f"got {list(output.shape[-3:])}"
            )
        error = (output - reference.to(output)) ** 2
        return error[..., channels, steps].flatten(-2).mean(-1)

    return Metric("mean squared error", "squared units", measure, (reference,))


def _as_slice(index: slice | int | None, size: int, axis: str) -> slice:
    if index is None:
        return slice(None)
    if isinstance(index, int):
        index = slice(index, index + 1) if index >= 0 else slice(index + size, index + size + 1)
    if not range(size)[index]:
        raise ArgumentError(f"{axis}={index} selects nothing of 0..{size - 1}")
    return index


def _of_class(
    name: str, unit: str, target: Tensor, transform: Callable[[Tensor], Tensor]
) -> Metric:
    if target.ndim != 1 or target.is_floating_point() or target.dtype == torch.bool:
        raise LabelError(
            f"expected targets as integers [pair], got {target.dtype} {list(target.shape)}"
        )

    def measure(output: Tensor, target: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[-2] != len(target):
            raise SeriesShapeError(
                f"expected logits of {len(target)} series, one per target, got {list(output.shape)}"
            )
        n_classes = output.shape[-1]
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < n_classes:
            bad = target[(target < 0) | (target >= n_classes)][0]
            raise LabelError(f"expected targets in 0..{n_classes - 1}, got {int(bad)}")
        index = target.to(output.device).long().expand(output.shape[:-1]).unsqueeze(-1)
        return transform(output).gather(-1, index).squeeze(-1)

    return Metric(f"{name} of the target class", unit, measure, (target,))
