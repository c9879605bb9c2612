"""What of the output is explained or steered: one number per series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tstlens.arguments import check_finite
from tstlens.data.labels import IndexNames, class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.metrics import name_of
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
