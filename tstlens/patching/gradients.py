"""Gradients of a metric with respect to activations of the corrupted run, averaged along a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.grids import Grid
from tstlens.patching.measuring import read_metric
from tstlens.patching.sites import Place
from tstlens.patching.worlds import CorruptedRun, start_of


@dataclass(frozen=True)
class Path:
    """Where gradients are taken.

    Args:
        of: what moves: ``"site"`` or ``"input"``.
        steps: points on the path; 0 is the corrupted run alone.
    """

    of: str
    steps: int

    def alphas(self, reach: float = 1.0) -> list[float]:
        """Fractions of the way, by the midpoint rule on [0, reach]."""
        if not self.steps:
            return [0.0]
        return [reach * (step + 0.5) / self.steps for step in range(self.steps)]


def delta(here: Tensor, given: Tensor, name: str) -> Tensor:
    """What replacing changes, ``given - here``; zero where both are the same infinity or NaN.

    Raises:
        ArgumentError: scores that are masked in one run and not in the other.
    """
    same = (here == given) | (here.isnan() & given.isnan())
    difference = torch.where(same, 0.0, given - here)
    if not bool(difference.isfinite().all()):
        raise ArgumentError(
            f"the change of {name} is not finite: the two runs mask different keys there, and no "
            "gradient covers that; attribute site 'pattern' instead, or sweep exactly"
        )
    return difference


def covered(place: Place, grid: Grid, by_series: Tensor) -> Tensor:
    """bool [1, *axes], True where any world of the grid replaces (worlds tile a box)."""
    mask = torch.ones((1,) * by_series.ndim, dtype=torch.bool, device=by_series.device)
    for number, entries in enumerate(grid.masks):
        shape = [1] * by_series.ndim
        shape[1 + number] = entries.shape[1]
        mask = mask & entries.any(0).view(shape)
    return mask


def gradient_of(metric: Metric, output: Tensor, n_pairs: int, at: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of every row's metric with respect to activations; zeros where it has none.

    Raises:
        ArgumentError: the metric cuts the gradient.
    """
    measured = read_metric(metric, output.unflatten(0, (-1, n_pairs)))
    if not measured.requires_grad:
        raise ArgumentError(
            "the metric has no gradient: expected a differentiable function of the output, such "
            "as patching.log_prob(target); does yours detach, or go through numpy or argmax?"
        )
    found = torch.autograd.grad(measured.sum(), list(at), allow_unused=True)
    return [
        torch.zeros_like(activation) if gradient is None else gradient
        for activation, gradient in zip(at, found, strict=True)
    ]


def input_gradients(
    model: HookedTST,
    run: CorruptedRun,
    end: Tensor | None,
    names: Sequence[str],
    metric: Metric,
    path: Path,
    per_chunk: int,
) -> dict[str, Tensor]:
    """Mean gradients at all named activations while what enters block 0 moves.

    Args:
        model: the model.
        run: the corrupted run.
        end: the clean embedding [row, pos, d_model]; None stays at the corrupted one.
        names: hook names inside the trunk.
        metric: what is differentiated.
        path: how many points.
        per_chunk: points that run at once.

    Returns:
        Gradients by name, each like one run's activation.
    """
    with torch.no_grad():
        start = model.embed_series(run.series, run.mask)[0]
    way = torch.zeros_like(start) if end is None else end - start
    alphas = path.alphas()

    def runs(some: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        at = start.new_tensor(some).view(-1, 1, 1, 1)
        residual = (start + at * way).flatten(0, 1).requires_grad_(True)
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        output = model.run_with_hooks(
            residual,
            start_at_layer=0,
            state=_repeated(run, 0, len(some)),
            fwd_hooks=[(name, keep) for name in names],
        )
        return output, [kept[name] for name in names]

    return dict(zip(names, _averaged(runs, alphas, run, metric, per_chunk), strict=True))


def site_gradients(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    layer: int | None,
    change: Tensor,
    at_name: str,
    metric: Metric,
    path: Path,
    reach: float,
    per_chunk: int,
) -> Tensor:
    """The mean gradient at one layer while its own activation moves, [row, ...].

    Args:
        model: the model.
        run: the corrupted run, with the activation at the place.
        place: the site.
        layer: its layer, None outside the blocks.
        change: what the activation moves by at the end of the path, like the activation.
        at_name: where the gradient is taken: the site itself, or the pattern behind q and k.
        metric: what is differentiated.
        path: how many points.
        reach: how far the path goes, as a fraction of ``change``.
        per_chunk: points that run at once.
    """
    name = place.hook_name(layer)
    here = run.acts[name]

    def runs(some: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        at = change.new_tensor(some).view(-1, *(1,) * change.ndim)
        moved = (here + at * change).flatten(0, 1).requires_grad_(True)
        kept = {name: moved}

        def replace(activation: Tensor, hook: Any) -> Tensor:
            del activation, hook
            return moved

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        hooks: list[Any] = [(name, replace)]
        if at_name != name:
            hooks.append((at_name, keep))
        output = _run_from(model, run, place, layer, len(some), hooks)
        return output, [kept[at_name]]

    return _averaged(runs, path.alphas(reach), run, metric, per_chunk)[0]


def _averaged(
    runs: Callable[[Sequence[float]], tuple[Tensor, list[Tensor]]],
    alphas: list[float],
    run: CorruptedRun,
    metric: Metric,
    per_chunk: int,
) -> list[Tensor]:
    totals: list[Tensor] = []
    for start in range(0, len(alphas), per_chunk):
        some = alphas[start : start + per_chunk]
        with torch.enable_grad():
            output, at = runs(some)
            gradients = gradient_of(metric, output, run.n_pairs, at)
        sums = [gradient.unflatten(0, (len(some), -1)).sum(0) for gradient in gradients]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [total / len(alphas) for total in totals]


def _repeated(run: CorruptedRun, layer: int, n: int) -> Any:
    series_of_row = torch.arange(run.n_pairs, device=run.final.device).repeat(n)
    return run.state_entering(layer).rows(series_of_row)


def _run_from(
    model: HookedTST, run: CorruptedRun, place: Place, layer: int | None, n: int, hooks: list[Any]
) -> Tensor:
    """``n`` copies of the corrupted run, from where the site lies."""

    def repeat(x: Tensor) -> Tensor:
        return x.expand(n, *x.shape).flatten(0, 1)

    first = start_of(model, place, layer)
    if first is not None:
        residual, state = repeat(run.entering(first)), _repeated(run, first, n)
        return model.run_with_hooks(residual, start_at_layer=first, state=state, fwd_hooks=hooks)
    mask = None if run.mask is None else repeat(run.mask)
    return model.run_with_hooks(repeat(run.series), mask=mask, fwd_hooks=hooks)
