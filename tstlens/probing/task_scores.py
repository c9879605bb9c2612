"""What an intervention does to the task: a score per series, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import check_finite, one_per_row
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError
from tstlens.metrics import Metric
from tstlens.model import HookedTST

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
