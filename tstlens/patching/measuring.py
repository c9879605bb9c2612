"""Reading a metric off the outputs of many worlds, the same way in every analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import check_finite, numbers_of_rows
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.metrics import Metric

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
