"""What of the output is explained or steered: one number per series.

What an intervention does to the task: a score per series, before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import check_finite, one_per_row
from tstlens.data import TimeSeriesData
from tstlens.data.labels import IndexNames, class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.metrics import Metric, name_of
from tstlens.model import HookedTST

_OF_CLASS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "probability": ("probability", lambda out: out.softmax(-1)),
    "log_probability": ("nats", lambda out: out.log_softmax(-1)),
    "logit": ("logit", lambda out: out),
}
_FORECAST = "mean_forecast"
MEASURES = (*_OF_CLASS, _FORECAST)


@dataclass(frozen=True)
class Measure:
    """A named number per series, read off the output.

    Args:
        name: what tables and figures call it.
        unit: ``"probability"``, ``"nats"``, ``"logit"``, or that of the output.
        read: from an output [batch, ...] and targets [batch] (or None) to [batch].
        needs_target: whether targets take part.
    """

    name: str
    unit: str
    read: Callable[[Tensor, Tensor | None], Tensor]
    needs_target: bool = False

    def __call__(self, output: Tensor, target: Tensor | None) -> Tensor:
        """[batch] numbers of an output [batch, ...]."""
        values = self.read(output, target)
        if values.shape != output.shape[:1]:
            raise ArgumentError(
                f"expected the measure to give one number per series [{len(output)}], got "
                f"{list(values.shape)}; it gets the output {list(output.shape)}"
            )
        check_finite(values, self.name, None)
        return values


def measure_of(
    model: HookedTST, measure: str | Callable[[Tensor], Tensor] | None, of_class: str
) -> Measure:
    """The measure that was asked for.

    Args:
        model: classifier or forecaster.
        measure: ``"probability"``, ``"log_probability"`` or ``"logit"`` of the target class;
            ``"mean_forecast"``, the forecast averaged over channels and horizon; a function of
            your own from outputs [batch, ...] to [batch]; None for ``of_class`` of a classifier
            and the mean forecast of a forecaster.
        of_class: what None means for a classifier.

    Raises:
        ArgumentError: another name, or one that this model's output does not have.
    """
    classifies = model.cfg.n_classes is not None
    if measure is None:
        measure = of_class if classifies else _FORECAST
    if callable(measure):
        own = measure
        return Measure(name_of(own), "the measure's own unit", lambda output, _: own(output))
    if measure not in MEASURES:
        raise ArgumentError(
            f"expected measure as one of {', '.join(MEASURES)}, or a function of the output, "
            f"got {measure!r}"
        )
    if measure == _FORECAST:
        if classifies:
            raise ArgumentError("measure='mean_forecast' is for forecasters; this model classifies")
        return Measure(
            "mean of the forecast",
            "units of the series",
            lambda output, _: output.flatten(1).mean(1),
        )
    if not classifies:
        raise ArgumentError(
            f"measure={measure!r} is for classifiers; this model forecasts: use 'mean_forecast' "
            "or a function of the forecast [batch, channel, horizon]"
        )
    unit, transform = _OF_CLASS[measure]

    def read(output: Tensor, target: Tensor | None) -> Tensor:
        index = torch.as_tensor(target).to(output.device).long()[:, None]
        return transform(output).gather(1, index)[:, 0]

    return Measure(f"{measure.replace('_', '-')} of the target class", unit, read, True)


def targets_of(
    model: HookedTST, measure: Measure, target: Tensor | int | None, n: int
) -> Tensor | None:
    """Targets as int [n] where the measure reads them, else None.

    Raises:
        ArgumentError: none were given, or given where nothing reads them.
        SeriesShapeError: another number of them.
        LabelError: outside the model's classes, or not integers.
    """
    if not measure.needs_target:
        if target is not None:
            raise ArgumentError(
                f"targets were given, but {measure.name} does not read them; pass None"
            )
        return None
    if target is None:
        raise ArgumentError(
            f"{measure.name} needs a target: a class, or one class per series [{n}]"
        )
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


class Runs:
    """Calls give the model's outputs over a data set with hooks on, [series, ...], on the CPU.

    What comes before the first hooked layer is run once.

    Args:
        model: runs in eval mode and without gradients.
        data: series, with their mask where they are padded.
        layer: no hook of any call lies before this layer; None runs everything every time.
        batch_size: series per forward pass.

    Raises:
        ArgumentError: no series.
    """

    def __init__(
        self, model: HookedTST, data: TimeSeriesData, layer: int | None, batch_size: int = 256
    ) -> None:
        if not len(data):
            raise ArgumentError("data: expected at least one series, got none")
        if batch_size < 1:
            raise ArgumentError(f"batch_size: expected at least 1, got {batch_size}")
        if getattr(model.cfg, "residual_attention", False):
            layer = None  # layers hand more on than the stream
        self.model, self.layer = model, layer
        self.batches: list[tuple[Any, Any]] = []
        with self._evaluating():
            for start in range(0, len(data), batch_size):
                part = data[start : start + batch_size]
                series = part.series.to(device=model.cfg.device, dtype=model.cfg.dtype)
                mask = None if part.mask is None else part.mask.to(series.device)
                if layer is None:
                    self.batches.append((series, mask))
                    continue
                _, state = model.embed_series(series, mask)
                stream = model(series, mask=mask, stop_at_layer=layer)
                self.batches.append((stream, state))

    def __call__(self, fwd_hooks: list[tuple[str, Any]]) -> Tensor:
        parts = []
        with self._evaluating(), self.model.hooks(fwd_hooks=fwd_hooks):
            for given, other in self.batches:
                if self.layer is None:
                    parts.append(self.model(given, mask=other).cpu())
                else:
                    output = self.model(given, start_at_layer=self.layer, state=other)
                    parts.append(output.cpu())
        return torch.cat(parts)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)


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
