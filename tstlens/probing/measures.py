"""One number per series: what of the output is explained or steered, and how the task is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import check_finite, one_per_row
from tstlens.data import TimeSeriesData
from tstlens.data.labels import IndexNames, class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.metrics import OF_CLASS, Metric, mean_forecast, name_of, of_class
from tstlens.model import HookedTST

FORECAST = "mean_forecast"
MEASURES = (*(what.replace("-", "_") for what in OF_CLASS), FORECAST)
Asked = str | Callable[[Tensor], Tensor] | None


def measured(
    model: HookedTST, measure: Asked, target: Tensor | int | None, n: int, usual: str
) -> Metric:
    """The metric that was asked for, with a target per series where it reads them.

    Args:
        model: classifier or forecaster.
        measure: ``"probability"``, ``"log_probability"`` or ``"logit"`` of the target class;
            ``"mean_forecast"``, the forecast averaged over channels and horizon; a function of
            your own from outputs [batch, ...] to [batch]; None for ``usual`` of a classifier and
            the mean forecast of a forecaster.
        target: a class, or one per series; None where nothing reads them.
        n: how many series.
        usual: what None means for a classifier.

    Raises:
        ArgumentError: another name, or one that this model's output does not have; targets that
            are lacking, or given where nothing reads them.
        SeriesShapeError: another number of targets.
        LabelError: targets outside the model's classes, or not integers.
    """
    classifies = model.cfg.n_classes is not None
    if measure is None:
        measure = usual if classifies else FORECAST
    if callable(measure):
        return _untargeted(Metric.of(measure, unit="the measure's own unit"), target)
    if measure not in MEASURES:
        raise ArgumentError(
            f"expected measure as one of {', '.join(MEASURES)}, or a function of the output, "
            f"got {measure!r}"
        )
    if measure == FORECAST:
        if classifies:
            raise ArgumentError("measure='mean_forecast' is for forecasters; this model classifies")
        forecast = Metric("mean of the forecast", "units of the series", mean_forecast)
        return _untargeted(forecast, target)
    if not classifies:
        raise ArgumentError(
            f"measure={measure!r} is for classifiers; this model forecasts: use 'mean_forecast' "
            "or a function of the forecast [batch, channel, horizon]"
        )
    what = measure.replace("_", "-")
    if target is None:
        raise ArgumentError(
            f"{what} of the target class needs a target: a class, or one class per series [{n}]"
        )
    return of_class(what, _targets(model, target, n))


def _untargeted(metric: Metric, target: Any) -> Metric:
    if target is not None:
        raise ArgumentError(f"targets were given, but {metric.name} does not read them; pass None")
    return metric


def _targets(model: HookedTST, target: Tensor | int, n: int) -> Tensor:
    n_classes = int(model.cfg.n_classes or 0)
    if type(target) is int and 0 <= target < n_classes:
        target = class_index(target, model.cfg.class_names or IndexNames(n_classes))
    labels = torch.as_tensor(target)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise LabelError(f"expected target classes as integers, got {labels.dtype}")
    if labels.ndim == 0:
        labels = labels.expand(n)
    if labels.shape != (n,):
        raise SeriesShapeError(f"expected one target per series [{n}], got {list(labels.shape)}")
    model.check_labels(labels, n, n_classes)
    return labels


MeasureOutput = Metric | Callable[[Tensor], Tensor]  # outputs [batch, ...] -> [batch]


def task_name(metric: MeasureOutput | None) -> str:
    """What :func:`score` measures, in words."""
    return "log-probability of the true class (nats)" if metric is None else name_of(metric)


def check_task(data: TimeSeriesData, output: Tensor, metric: MeasureOutput | None) -> None:
    """Raise unless there is a score: labels of a classifier, or a metric of the user's own."""
    if metric is None and (output.ndim != 2 or data.labels is None):
        raise LabelError(
            "expected a classifier and labelled series, or metric=: a function from outputs "
            "[batch, ...] to one number per series, larger for better"
        )


def score(
    data: TimeSeriesData, output: Tensor, metric: MeasureOutput | None
) -> tuple[Tensor, Tensor]:
    """Per series the metric (by default the log-probability of its class, in nats), and whether
    the class is right (NaN without labels or with forecasts)."""
    right = torch.full((len(output),), float("nan"), dtype=torch.float64)
    value = right
    if data.labels is not None and output.ndim == 2:
        labels = data.labels.cpu()
        HookedTST.check_labels(labels, len(output), output.shape[1])
        right = (output.argmax(1) == labels).double()
        value = output.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
        check_finite(value, "the log-probability of the class")
    if metric is not None:
        value = one_per_row(metric(output), output, "metric").double()
    return value, right
