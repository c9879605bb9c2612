"""Metrics: from a model's output to one number per series.

Probabilities saturate: where the model is nearly certain a large change of the logits hardly moves
them. Log-probabilities and logit differences do not, so look at both.

One number of a model's output: a class' logit, a difference of two, a step of a forecast.

Reading a metric off the outputs of many worlds, the same way in every analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.arguments import Share, check_finite, check_slice, checked, numbers_of_rows
from tstlens.data import Pairs
from tstlens.data.labels import IndexNames, class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, SeriesValueError
from tstlens.metrics import Metric, OfClass, check_targets, of_class
from tstlens.model import HeadConfig, HookedTST
from tstlens.zoo.parts import PARAMETERS, Distribution, quantiles_of


@checked
def prob(target: Int[Tensor, " pair"]) -> Metric:
    """Probability of the target class, between 0 and 1.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return of_class("probability", target)


@checked
def log_prob(target: Int[Tensor, " pair"]) -> Metric:
    """Log-probability of the target class, in nats.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return of_class("log-probability", target)


@checked
def logit(target: Int[Tensor, " pair"]) -> Metric:
    """Logit of the target class.

    Args:
        target: int [pair], indices of the model's logits.
    """
    return of_class("logit", target)


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
    check_targets(target)
    check_targets(other)
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
    level: Share | None = None,
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


def _logit_difference(output: Tensor, target: Tensor, other: Tensor) -> Tensor:
    return OfClass()(output, target) - OfClass()(output, other)


@dataclass(frozen=True)
class OutputPart:
    """Which output is split.

    Args:
        name: what figures call it.
        direction: [series, rows of a series, d_pooled], what the output is of each pooled vector.
        constant: [series], the head's bias.
        place: labels and other labels [series] of a classifier; channel and step of a forecast.
        keep: the row of a series that the output is of; None for all.
    """

    name: str
    direction: Tensor
    constant: Tensor
    place: tuple[Any, Any]
    keep: int | None = None

    @classmethod
    def of(
        cls,
        model: HookedTST,
        head: HeadConfig,
        n: int,
        labels: Tensor | int | None,
        other: Tensor | int | None,
        channel: int | None,
        step: int | None,
    ) -> OutputPart:
        n_rows = (model.cfg.n_channels or 1) if model.cfg.channel_independent else 1
        if head.n_classes is not None:
            if channel is not None or step is not None:
                raise ArgumentError("channel= and step= are for forecasts; this model classifies")
            if labels is None:
                raise ArgumentError(
                    "labels= is needed: the class whose logit is split, int [batch]"
                )
            index = _classes("labels", labels, n, head.n_classes, model)
            minus = None if other is None else _classes("other", other, n, head.n_classes, model)
            direction, constant = model.W_U.T[index], model.b_U[index]
            name = f"logit of {_class_name(model, index)}"
            if minus is not None:
                direction, constant = direction - model.W_U.T[minus], constant - model.b_U[minus]
                name += f" minus {_class_name(model, minus)}"
            return cls(name, direction.view(n, n_rows, -1), constant, (index, minus))
        if labels is not None or other is not None:
            raise ArgumentError(
                "labels= and other= are classes, and this model forecasts: give channel= and step="
            )
        n_channels, horizon = model.cfg.n_channels or 1, head.horizon or 1
        if channel is None and n_channels == 1:
            channel = 0
        channel = _in_range("channel", channel, n_channels)
        step = _in_range("step", step, horizon)
        column = step if n_rows > 1 else channel * horizon + step
        direction = model.W_U[:, column].expand(n, n_rows, -1)
        constant = model.b_U[column].expand(n)
        keep = channel if n_rows > 1 else None
        return cls(
            f"forecast of channel {channel}, step {step}",
            direction,
            constant,
            (channel, step),
            keep,
        )

    def rows(self, rows: slice) -> OutputPart:
        """The same for some of the series."""
        first, second = (part[rows] if isinstance(part, Tensor) else part for part in self.place)
        return replace(
            self,
            direction=self.direction[rows],
            constant=self.constant[rows],
            place=(first, second),
        )

    def by_series(self, per_row: Tensor) -> Tensor:
        """[row, ...] as [series, ...], with a channel axis where every row of a series counts."""
        n_rows = self.direction.shape[1]
        grouped = per_row.unflatten(0, (-1, n_rows))
        return grouped[:, self.keep or 0] if n_rows == 1 or self.keep is not None else grouped

    def read(self, output: Tensor) -> Tensor:
        """The output asked for, [series]."""
        first, second = self.place
        if not isinstance(first, Tensor):
            return output[:, first, second]
        chosen = output.gather(1, first[:, None])[:, 0]
        return chosen if second is None else chosen - output.gather(1, second[:, None])[:, 0]


def _classes(name: str, given: Tensor | int, n: int, n_classes: int, model: HookedTST) -> Tensor:
    if type(given) is int and 0 <= given < n_classes:
        given = class_index(given, model.cfg.class_names or IndexNames(n_classes))
    given = torch.as_tensor(given)
    if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
        raise LabelError(
            f"expected {name} as integers [batch={n}] or one integer, got {given.dtype} "
            f"{list(given.shape)}"
        )
    index = given.long().to(model.W_U.device).expand(n) if given.ndim == 0 else given.long()
    if len(index) != n:
        raise LabelError(f"expected one entry of {name} per series [{n}], got {list(given.shape)}")
    bad = index[(index < 0) | (index >= n_classes)]
    if len(bad):
        raise LabelError(f"expected {name} in 0..{n_classes - 1}, got {int(bad[0])}")
    return index.to(model.W_U.device)


def _class_name(model: HookedTST, index: Tensor) -> str:
    """The class where it is one for all series."""
    if bool((index != index[0]).any()):
        return "the class asked for"
    names = model.cfg.class_names
    return f"class {names[int(index[0])] if names else int(index[0])}"


def _in_range(name: str, value: int | None, size: int) -> int:
    if value is None:
        raise ArgumentError(f"{name}= is needed: one of the forecast's {size} {name}s")
    if not -size <= value < size:
        raise ArgumentError(f"expected {name} in 0..{size - 1}, got {value}")
    return value % size


MeasureOutput = Metric | Callable[[Tensor], Tensor]
PAIRS_PER_BLOCK = 128  # pairs whose activations are held at once
# Steps of the number format that two runs of one model differ by, at the scale of its output. Of
# untrained and trained models of 2 to 6 layers, float32 sweeps erred by up to 7 against float64.
ROUNDINGS = 8.0


def as_metric(metric: MeasureOutput, n_pairs: int) -> Metric:
    """The metric, a function of the user's own with its name; raise unless it fits the pairs."""
    if not callable(metric):
        raise ArgumentError(
            f"metric must be patching.log_prob(target) or another function of the output, "
            f"got {metric!r}"
        )
    metric = metric if isinstance(metric, Metric) else Metric.of(metric)
    if metric.n_pairs not in (None, n_pairs):
        raise SeriesShapeError(
            f"the metric has targets for {metric.n_pairs} pairs, the series are {n_pairs} pairs"
        )
    return metric


def metric_named(name: str, pairs: Pairs, what: str) -> Metric:
    """The metric of this name for these pairs.

    Args:
        name: that results keep.
        pairs: whose targets, and predicted classes, it is of.
        what: was made with it, for the error.

    Raises:
        ArgumentError: it cannot be made from the pairs alone.
    """
    made = [make(pairs.target) for make in (log_prob, prob, logit)]
    if pairs.predicted is not None:
        made.append(logit_diff(pairs.target, pairs.predicted))
    for metric in made:
        if metric.name == name:
            return metric
    raise ArgumentError(
        f"{what} was made with the metric {name!r}, which these pairs alone do not give; pass "
        "metric=, for these pairs"
    )


def read_metric(metric: Metric, output: Tensor) -> Tensor:
    """The metric of outputs [world, pair, ...] as [world, pair]."""
    if metric.targets:
        return metric(output)
    if not len(output):
        return output.new_zeros(0, output.shape[1])
    values = [numbers_of_rows(metric(of_world), of_world, "metric") for of_world in output]
    found = torch.stack(values)
    check_finite(found, "metric")
    return found


def read_runs(metric: Metric, corrupted: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
    """Baseline, clean value and rounding [pair] of the outputs [pair, ...] of the two runs.

    A difference of two runs' metrics says nothing below its rounding. To first order it is what a
    relative error of the outputs does: the number format's step at the output's largest entry,
    times the length of the metric's gradient, and the step at the metric itself.
    """
    values, levels = [], []
    for output in (corrupted,) if clean is None else (corrupted, clean):
        leaf = output.detach().requires_grad_(output.is_floating_point())
        slope = torch.zeros(())
        with torch.enable_grad():
            try:
                value = read_metric(metric, leaf[None])[0]
                if value.requires_grad:
                    slope = torch.autograd.grad(value.sum(), leaf)[0].flatten(1).norm(dim=1)
            except RuntimeError:  # a function of the user's own may go through numpy
                value = read_metric(metric, output.detach()[None])[0]
        value = value.detach()
        size = leaf.detach().flatten(1).abs().amax(1).to(value)
        step = torch.finfo(leaf.dtype if leaf.is_floating_point() else value.dtype).eps
        values.append(value)
        levels.append(ROUNDINGS * step * (size * slope.to(value) + value.abs()))
    return {
        "baseline": values[0],
        "clean": values[-1],
        "rounding": torch.stack(levels).amax(0),
    }


def joined(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What :func:`read_runs` gave for blocks of pairs, for all of them."""
    return {name: torch.cat([run[name] for run in runs]) for name in runs[0]}


def described(metric: Metric) -> dict[str, Any]:
    """What results keep of a metric."""
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "better": metric.better,
        "range": metric.range,
    }


def pair_blocks(n_pairs: int, metric: Metric) -> Iterator[slice]:
    """Pairs that are held at once; a function of all pairs' outputs needs them all."""
    if not n_pairs:
        raise ArgumentError("expected at least one pair, got none")
    per_block = PAIRS_PER_BLOCK if metric.targets else n_pairs
    for start in range(0, n_pairs, per_block):
        yield slice(start, min(start + per_block, n_pairs))
