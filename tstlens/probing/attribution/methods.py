"""Calls of captum and shap: nothing is computed here that they compute."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tstlens.errors import ArgumentError
from tstlens.probing.attribution.units import Cells, feature_mask, seen_units, spread, summed
from tstlens.randomness import seeded

METHODS = (
    "integrated_gradients",
    "gradient_shap",
    "occlusion",
    "shapley_sampling",
    "kernel_shap",
    "permutation_shap",
)


@dataclass(frozen=True, eq=False)
class Task:
    """What is explained, on the model's device.

    Args:
        forward: from (series, mask, target) to one number per series.
        series: [batch, channel, time].
        baseline: [batch, channel, time], or [sample, channel, time] where ``many``.
        mask: [batch, time] or None.
        target: [batch] or None.
        cells: samples of every unit.
        many: whether the baselines are a set.
    """

    forward: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    series: Tensor
    baseline: Tensor
    mask: Tensor | None
    target: Tensor | None
    cells: Cells
    many: bool

    @property
    def beside(self) -> tuple[Tensor | None, Tensor | None]:
        """What captum passes on to ``forward`` beside the series."""
        return (self.mask, self.target)

    def each(self) -> Iterator[Task]:
        """The series one by one."""
        for row in range(len(self.series)):
            at = slice(row, row + 1)
            yield replace(
                self,
                series=self.series[at],
                baseline=self.baseline if self.many else self.baseline[at],
                mask=None if self.mask is None else self.mask[at],
                target=None if self.target is None else self.target[at],
            )


@seeded(0)
def required(method: str) -> Any:
    """The module that the method comes from.

    Raises:
        ArgumentError: there is no such method, or its library is not installed.
    """
    if method not in METHODS:
        raise ArgumentError(f"expected method as one of {', '.join(METHODS)}, got {method!r}")
    library = "shap" if method == "permutation_shap" else "captum"
    try:
        return importlib.import_module("shap" if library == "shap" else "captum.attr")
    except ImportError as error:
        raise ArgumentError(
            f"method={method!r} needs {library}, which is not installed: "
            'pip install "tstlens[probing]"'
        ) from error


def run_method(
    library: Any,
    method: str,
    task: Task,
    n_steps: int,
    n_samples: int,
    rows_per_pass: int,
    seed: int,
) -> Tensor:
    """Values [batch, channel, unit] of one method."""
    if method == "integrated_gradients":
        values = library.IntegratedGradients(task.forward).attribute(
            task.series,
            baselines=task.baseline,
            additional_forward_args=task.beside,
            n_steps=n_steps,
            internal_batch_size=max(rows_per_pass, len(task.series)),
        )
        return _summed(values.detach().to(task.series), task)
    if method == "gradient_shap":
        return _summed(_gradient_shap(library, task, n_samples), task)
    if method == "permutation_shap":
        rows = [
            _permutation_shap(library, one, n_samples, rows_per_pass, seed + row)
            for row, one in enumerate(task.each())
        ]
        return torch.cat(rows)
    n_channels, n_time = task.series.shape[1:]
    options: dict[str, Any] = {
        "baselines": task.baseline,
        "additional_forward_args": task.beside,
        "feature_mask": feature_mask(task.cells, n_channels, n_time).to(task.series.device),
        "perturbations_per_eval": max(1, rows_per_pass // len(task.series)),
    }
    if method == "occlusion":
        values = library.FeatureAblation(task.forward).attribute(task.series, **options)
    elif method == "shapley_sampling":
        sampling = library.ShapleyValueSampling(task.forward)
        values = sampling.attribute(task.series, n_samples=n_samples, **options)
    else:
        values = torch.cat(
            [
                library.KernelShap(one.forward).attribute(
                    one.series,
                    n_samples=n_samples,
                    **options
                    | {
                        "baselines": one.baseline,
                        "additional_forward_args": one.beside,
                        "perturbations_per_eval": rows_per_pass,
                    },
                )
                for one in task.each()
            ]
        )
    return _of_first_sample(values.detach().to(task.series), task.cells)


def _summed(values: Tensor, task: Task) -> Tensor:
    """Added up over units; missing values, which no baseline fills in, have no share."""
    return summed(torch.where(task.series.isnan(), 0.0, values), task.cells)


def _of_first_sample(values: Tensor, cells: Cells) -> Tensor:
    """captum gives every sample of a unit the unit's value; 0 for units without samples."""
    found = values.new_zeros(*values.shape[:2], len(cells))
    for number, (start, stop) in enumerate(cells):
        if stop > start:
            found[:, :, number] = values[:, :, start]
    return found


def _gradient_shap(library: Any, task: Task, n_samples: int) -> Tensor:
    """captum draws baselines from one set for all series, so those with their own go one by one."""
    explainer = library.GradientShap(task.forward)

    def run(part: Task, baselines: Tensor) -> Tensor:
        values = explainer.attribute(
            part.series,
            baselines=baselines,
            additional_forward_args=part.beside,
            n_samples=n_samples,
            stdevs=0.0,
        )
        return values.detach().to(part.series)

    if task.many:
        return run(task, task.baseline)
    if bool((task.baseline == task.baseline[:1]).all()):
        return run(task, task.baseline[:1])
    return torch.cat([run(one, one.baseline) for one in task.each()])


@torch.no_grad()
def _permutation_shap(
    library: Any, task: Task, n_samples: int, rows_per_pass: int, seed: int
) -> Tensor:
    """shap's explainer over which units are the series' own (1) and which the baseline's (0)."""
    n_channels, n_time = task.series.shape[1:]
    n_units = len(task.cells)
    seen = seen_units(task.mask, task.cells, task.series).flatten()
    plays = seen.nonzero()[:, 0]

    def output(coalitions: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(coalitions), rows_per_pass):
            own = torch.from_numpy(coalitions[start : start + rows_per_pass]) > 0.5
            chosen = torch.ones(len(own), n_channels * n_units, dtype=torch.bool)
            chosen[:, plays] = own
            where = spread(chosen.view(-1, n_channels, n_units), task.cells, n_time)
            mixed = torch.where(where.to(task.series.device), task.series, task.baseline)
            beside = [None if x is None else x.expand(len(own), *x.shape[1:]) for x in task.beside]
            parts.append(task.forward(mixed, beside[0], beside[1]).double().cpu())
        return torch.cat(parts).numpy()

    explainer = library.explainers.Permutation(output, np.zeros((1, len(plays))), seed=seed)
    everything = np.ones((1, len(plays)))
    found = explainer(everything, max_evals=n_samples * (2 * len(plays) + 1), silent=True)
    values = torch.zeros(n_channels * n_units, dtype=torch.float64)
    values[plays] = torch.from_numpy(np.asarray(found.values)[0])
    return values.view(1, n_channels, n_units).to(task.series)
