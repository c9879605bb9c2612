"""Metrics: from a model's output to one number per series.

Probabilities saturate: where the model is nearly certain a large change of the logits hardly moves
them. Log-probabilities and logit differences do not, so look at both.

One number of a model's output: a class' logit, a difference of two, a step of a forecast.

Reading a metric off the outputs of many worlds, the same way in every analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.arguments import Share, check_finite, check_slice, checked, numbers_of_rows
from tstlens.data import ForecastWindows, Pairs
from tstlens.data.labels import IndexNames, class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, SeriesValueError
from tstlens.metrics import Metric, OfClass, check_targets, of_class
from tstlens.model import HeadConfig, HookedTST
from tstlens.model.reading import Points, Quantiles, Reading, reading_of
from tstlens.zoo.parts import Distribution, Parameters


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


Part = slice | int | None


@checked
def mse(
    reference: Float[Tensor, "pair channel horizon"] | ForecastWindows,
    horizon: Part = None,
    channel: Part = None,
) -> Metric:
    """Mean squared error of a forecast, in squared units of the output (lower is better).

    What is compared is what the source calls its mean: the point forecast of heads that give one.

    Args:
        reference: what the forecast is compared with, [pair, channel, horizon]: true values (of
            windows, their future), or the clean run's forecast. It may be shorter than the
            forecast; NaN is not counted.
        horizon: steps that count; None for all that the reference has.
        channel: channels that count; None for all.

    Raises:
        SeriesShapeError: the reference has other axes than a forecast.
        SeriesValueError: it has infinity, or nothing that counts for a pair.
    """
    measure, known = _compared(reference, horizon, channel, _squared)
    return Metric(
        "mean squared error", "squared units", measure, (known,), "lower", (0.0, math.inf)
    )


@checked
def mae(
    reference: Float[Tensor, "pair channel horizon"] | ForecastWindows,
    horizon: Part = None,
    channel: Part = None,
) -> Metric:
    """Mean absolute error of a forecast's median, in units of the output (lower is better).

    Args:
        reference: as for :func:`mse`.
        horizon: steps that count; None for all that the reference has.
        channel: channels that count; None for all.

    Raises:
        SeriesShapeError, SeriesValueError: as for :func:`mse`.
    """
    measure, known = _compared(reference, horizon, channel, _absolute)
    return Metric("mean absolute error", "units", measure, (known,), "lower", (0.0, math.inf))


@checked
def mase(windows: ForecastWindows, horizon: Part = None, channel: Part = None) -> Metric:
    """Mean absolute error in multiples of what repeating the last season missed in the past.

    The median's error, divided channel by channel by the mean absolute difference of the samples
    seen to those one season (``windows.period``) before them.

    Args:
        windows: with what came, and more than a season seen.
        horizon: steps that count; None for all that came.
        channel: channels that count; None for all.

    Raises:
        SeriesShapeError, SeriesValueError: as for :func:`mse`; also a past that does not change
            from season to season, so that there is nothing to divide by.

    Source: Hyndman and Koehler 2006, "Another look at measures of forecast accuracy".
    """
    seen, period = windows.series, windows.period
    if seen.shape[2] <= period:
        raise SeriesShapeError(
            f"expected windows of more than one season ({period} samples), got {seen.shape[2]}"
        )
    scale = (seen[..., period:] - seen[..., :-period]).abs().nanmean(2)
    if not bool((scale > 0).all()):
        raise SeriesValueError(
            "expected a past that changes from season to season, got one that does not in window "
            f"{int((~(scale > 0)).nonzero()[0, 0])}; take patching.mae"
        )
    measure, known = _compared(windows, horizon, channel, _scaled)
    return Metric(
        "mean absolute scaled error", "seasonal errors", measure, (known, scale), "lower",
        (0.0, math.inf),
    )  # fmt: skip


@checked
def quantile_loss(
    reference: Float[Tensor, "pair channel horizon"] | ForecastWindows,
    levels: Sequence[float] | None = None,
    horizon: Part = None,
    channel: Part = None,
    level: Share | None = None,
    distribution: Distribution | None = None,
) -> Metric:
    """Mean pinball loss of a forecast's quantiles, in units of the output (lower is better).

    For a quantile at level q it is ``q (y - f)`` where the truth y lies above the forecast f, and
    ``(1 - q)(f - y)`` below it; its expectation is least at the true quantile. At level 0.5 it is
    half the absolute error. It says nothing about levels that are not given.

    Args:
        reference: true values, [pair, channel, horizon], or windows; as for :func:`mse`.
        levels: of the output's quantiles, in the order of its last axis (of a model that gives
            quantiles), or those to take from its distribution; None for the model's own (0.1 to
            0.9 of a distribution).
        horizon: steps that count; None for all that the reference has.
        channel: channels that count; None for all.
        level: the one that counts; None for the mean over all.
        distribution: ``"normal"`` or ``"student_t"`` where the output is a distribution's
            parameters [pair, channel, horizon, parameter]; None where it is quantiles. The model
            says so itself where ``levels`` is None.

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
    reading: Reading | None = None
    if levels is None:
        if distribution is not None:
            raise ArgumentError("distribution= is for levels= of your own; the model knows both")
    else:
        levels = tuple(levels)
        if not levels or not all(0 < entry < 1 for entry in levels):
            raise ArgumentError(f"levels must lie between 0 and 1, at least one, got {levels}")
        if level is not None and level not in levels:
            raise ArgumentError(f"level must be one of {levels}, got {level}")
        if distribution is not None and distribution not in ("normal", "student_t"):
            raise ArgumentError(
                f"quantiles are taken from a normal or student_t distribution, got {distribution!r}"
            )
        reading = Parameters(distribution) if distribution else Quantiles(levels)
    wanted = (level,) if level is not None else levels
    measure, known = _compared(reference, horizon, channel, _Pinball(wanted), reading)
    name = "quantile loss" if level is None else f"quantile loss at level {level:g}"
    return Metric(name, "units", measure, (known,), "lower", (0.0, math.inf))


@checked
def crps(
    reference: Float[Tensor, "pair channel horizon"] | ForecastWindows,
    horizon: Part = None,
    channel: Part = None,
) -> Metric:
    """Continuous ranked probability score, from the model's quantiles (lower is better).

    Twice the mean pinball loss over the model's levels (0.1 to 0.9 of a distribution), in units of
    the output: what forecasting libraries report. Few levels make it an approximation, which
    leaves out what happens beyond the outermost. Of one value per step it is the absolute error.

    Args:
        reference: as for :func:`mse`.
        horizon: steps that count; None for all that the reference has.
        channel: channels that count; None for all.

    Raises:
        SeriesShapeError, SeriesValueError: as for :func:`mse`.

    Source: Gneiting and Raftery 2007, "Strictly proper scoring rules".
    """
    measure, known = _compared(reference, horizon, channel, _Pinball(None, 2.0))
    return Metric("CRPS", "units", measure, (known,), "lower", (0.0, math.inf))


@checked
def forecast(
    step: int | slice | Literal["peak", "trough", "mean", "total"] = "mean",
    level: Share | None = 0.5,
    channel: Part = None,
) -> Metric:
    """What is forecast: one step, or the peak, trough, mean or sum over steps, in its units.

    Neither direction is an improvement. The levels are the model's own: it says how its output is
    read.

    Args:
        step: one step (negative from the end) or a slice of them, whose mean it is; ``"peak"`` and
            ``"trough"`` are the largest and smallest over the horizon, ``"total"`` the sum.
        level: of the quantile that is read; None for what the source calls its mean. A head that
            gives one value per step has that one.
        channel: channels that count, as their mean; None for all.

    Raises:
        ArgumentError: in an analysis, where the model is no forecaster, has no such level, step or
            channel.

    Example:
        >>> from tstlens import HookedTST, patching
        >>> from tstlens.data import load_forecasting
        >>> model, windows = HookedTST.from_pretrained("co2"), load_forecasting("co2")[:2]
        >>> metric = patching.forecast("peak").for_model(model)
        >>> bool((metric(model(windows.series)) == model(windows.series).amax((1, 2))).all())
        True
    """
    if isinstance(step, str):
        name = f"{step} of the forecast"
    else:
        at = step if isinstance(step, int) else f"{step.start or 0} to {step.stop}"
        name = f"forecast at step {at}"
    name += "" if level in (0.5, None) else f" (level {level:g})"
    return Metric(name, "units", _Forecast(step, level, channel))


def _squared(reading: Reading, output: Tensor, truth: Tensor) -> Tensor:
    return (reading.mean(output) - truth) ** 2


def _absolute(reading: Reading, output: Tensor, truth: Tensor) -> Tensor:
    return (reading.median(output) - truth).abs()


def _scaled(reading: Reading, output: Tensor, truth: Tensor, scale: Tensor) -> Tensor:
    return _absolute(reading, output, truth) / scale[..., None].to(output)


@dataclass(frozen=True)
class _Pinball:
    """``factor`` times the mean pinball loss over levels; None for the model's own."""

    levels: tuple[float, ...] | None
    factor: float = 1.0

    def __call__(self, reading: Reading, output: Tensor, truth: Tensor) -> Tensor:
        levels = self.levels or reading.usual_levels
        at = torch.tensor(levels).to(output)
        error = truth[..., None] - reading.quantiles(output, levels)
        return self.factor * torch.maximum(at * error, (at - 1) * error).mean(-1)


@dataclass(frozen=True)
class _Read:
    """What reads a forecast off an output: as the model says, else as one value per step."""

    reading: Reading | None = field(default=None, kw_only=True)

    def bound(self, model: Any) -> Any:
        """The same for a model's output."""
        return self if self.reading is not None else replace(self, reading=reading_of(model.cfg))


@dataclass(frozen=True)
class _Error(_Read):
    """Mean error [*world, pair] over some channels and steps, of what is known of the truth."""

    channels: slice
    steps: slice
    error: Callable[..., Tensor]

    def bound(self, model: Any) -> Any:
        """The same for a model's output; a reconstruction has no horizon, and a value per step."""
        forecasts = getattr(model.cfg.head, "horizon", None) is not None
        return super().bound(model) if forecasts else self

    def __call__(self, output: Tensor, reference: Tensor, *beside: Tensor) -> Tensor:
        reading = self.reading or Points()
        entries = 0 if reading.n_entries is None else 1
        axes = output.shape[output.ndim - 3 - entries : output.ndim - entries]
        n_steps = reference.shape[2]
        last = [] if reading.n_entries is None else [reading.n_entries]
        if (
            output.ndim < 3 + entries
            or axes[:2] != reference.shape[:2]
            or axes[2] < n_steps
            or (entries and output.shape[-1] != reading.n_entries)
        ):
            kind = {0: "forecasts", 1: "parameters"}[entries]
            kind = "quantiles" if reading.levels else kind
            words = ", ".join(["pair", "channel", "horizon", *map(str, last)])
            raise SeriesShapeError(
                f"expected {kind} [{words}] = {[*reference.shape, *last]}, got "
                f"{list(output.shape[-3 - entries :])}"
            )
        index = (..., self.channels, self.steps, *([slice(None)] * entries))
        truth = reference[:, self.channels, self.steps].to(output)
        known = ~truth.isnan()
        read = output[..., :n_steps, :] if entries else output[..., :n_steps]
        kept = [part[:, self.channels] for part in beside]
        error = self.error(reading, read[index], truth.nan_to_num(), *kept) * known
        return error.flatten(-2).sum(-1) / known.flatten(1).sum(1)


@dataclass(frozen=True)
class _Forecast(_Read):
    """A number [*world, pair] of what is forecast."""

    step: int | slice | str
    level: float | None
    channel: Part

    def __call__(self, output: Tensor) -> Tensor:
        if self.reading is None:
            raise ArgumentError(
                "what is forecast is read as the model says: give the metric to an analysis, or "
                "bind it, patching.forecast(...).for_model(model)"
            )
        reading = self.reading
        reading.check(output)
        if self.level is None:
            values = reading.mean(output)
        else:
            values = reading.quantiles(output, (self.level,))[..., 0]
        values = values[..., _as_slice(self.channel, values.shape[-2], "channel"), :]
        if isinstance(self.step, str):
            values = values.mean(-2)
            of = {"peak": values.amax, "trough": values.amin, "mean": values.mean}
            return of.get(self.step, values.sum)(-1)
        return values[..., _as_slice(self.step, values.shape[-1], "step")].flatten(-2).mean(-1)


def _compared(
    reference: Tensor | ForecastWindows,
    horizon: Part,
    channel: Part,
    error: Callable[..., Tensor],
    reading: Reading | None = None,
) -> tuple[_Error, Tensor]:
    """What measures an error, and the truth [pair, channel, horizon] that it is compared with."""
    known = reference.future if isinstance(reference, ForecastWindows) else reference
    if known.ndim != 3:
        raise SeriesShapeError(
            f"expected a reference [pair, channel, horizon], got {list(known.shape)}"
        )
    if bool(known.isinf().any()):
        raise SeriesValueError("expected a finite reference, got infinity")
    steps = _as_slice(horizon, known.shape[2], "horizon")
    channels = _as_slice(channel, known.shape[1], "channel")
    nothing = known[:, channels, steps].isnan().flatten(1).all(1)
    if bool(nothing.any()):
        raise SeriesValueError(
            f"expected a value to compare with for every pair, got only NaN for pair "
            f"{int(nothing.nonzero()[0, 0])}; leave it out, or choose other steps"
        )
    return _Error(channels, steps, error, reading=reading), known


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


def as_metric(metric: MeasureOutput, n_pairs: int, model: Any = None) -> Metric:
    """The metric as it reads the model's output; raise unless it fits the pairs.

    A function of the user's own gets its name.
    """
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
    return metric if model is None else metric.for_model(model)


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
