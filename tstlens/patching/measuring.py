"""Reading a metric off the outputs of many worlds, the same way in every analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import check_finite, numbers_of_rows
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.patching.metrics import Metric

MeasureOutput = Metric | Callable[[Tensor], Tensor]
PAIRS_PER_BLOCK = 128  # pairs whose activations are held at once


def read_metric(metric: MeasureOutput, output: Tensor) -> Tensor:
    """The metric of outputs [world, pair, ...] as [world, pair]."""
    if isinstance(metric, Metric):
        return metric(output)
    if not len(output):
        return output.new_zeros(0, output.shape[1])
    values = [numbers_of_rows(metric(of_world), of_world, "metric") for of_world in output]
    found = torch.stack(values)
    check_finite(found, "metric")
    return found


def check_metric(metric: MeasureOutput, n_pairs: int) -> None:
    """Raise unless the metric can be called, and has a target for every pair."""
    if not callable(metric):
        raise ArgumentError(
            f"metric must be patching.log_prob(target) or another function of the output, "
            f"got {metric!r}"
        )
    if isinstance(metric, Metric) and metric.n_pairs != n_pairs:
        raise SeriesShapeError(
            f"the metric has targets for {metric.n_pairs} pairs, the series are {n_pairs} pairs"
        )


def pair_blocks(n_pairs: int, metric: MeasureOutput) -> Iterator[slice]:
    """Pairs that are held at once; a function of all pairs' outputs needs them all."""
    if not n_pairs:
        raise ArgumentError("expected at least one pair, got none")
    per_block = PAIRS_PER_BLOCK if isinstance(metric, Metric) else n_pairs
    for start in range(0, n_pairs, per_block):
        yield slice(start, min(start + per_block, n_pairs))


def metric_name(metric: Any) -> str:
    """What results call a metric of the user's own."""
    return getattr(metric, "__name__", type(metric).__name__)
