"""What an intervention does to the task: a score per series, before and after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError
from tstlens.model import HookedTST

Metric = Callable[[Tensor], Tensor]  # outputs [batch, ...] -> [batch]


@torch.no_grad()
def outputs(
    model: HookedTST, data: TimeSeriesData, fwd_hooks: list, batch_size: int = 256
) -> Tensor:
    """The model's outputs over a data set with hooks on, [series, ...], on the CPU."""
    parts = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(data), batch_size):
            part = data[start : start + batch_size]
            series = part.series.to(device=model.cfg.device, dtype=model.cfg.dtype)
            mask = None if part.mask is None else part.mask.to(series.device)
            with model.hooks(fwd_hooks=fwd_hooks):
                parts.append(model(series, mask=mask).cpu())
    finally:
        model.train(training)
    return torch.cat(parts)


def check_task(data: TimeSeriesData, output: Tensor, metric: Metric | None) -> None:
    """Raise unless there is a score: labels of a classifier, or a metric of the user's own."""
    if metric is None and (output.ndim != 2 or data.labels is None):
        raise LabelError(
            "expected a classifier and labelled series, or metric=: a function from outputs "
            "[batch, ...] to one number per series, larger for better"
        )
    if not len(data):
        raise ArgumentError("data: expected at least one series, got none")


def score(data: TimeSeriesData, output: Tensor, metric: Metric | None) -> tuple[Tensor, Tensor]:
    """Per series the metric (by default the log-probability of its class, in nats), and whether
    the class is right (NaN without labels or with forecasts)."""
    right = torch.full((len(output),), float("nan"), dtype=torch.float64)
    value = right
    if data.labels is not None and output.ndim == 2:
        labels = data.labels.cpu()
        right = (output.argmax(1) == labels).double()
        value = output.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    if metric is not None:
        value = torch.as_tensor(metric(output)).double()
        if value.shape != (len(output),):
            raise ArgumentError(
                f"expected metric to give one number per series [{len(output)}], got "
                f"{list(value.shape)}"
            )
    return value, right
