"""The parity check: the converted model and its source on the same inputs, in two precisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.arguments import checked
from tstlens.model import HookedTST, Parity

TOLERANCE = 1e-5  # of the output's scale, float32: rebuilt transformers land at 1e-7 to 5e-6
TOLERANCE_FLOAT64 = 1e-10
LARGE = 100_000_000  # parameters from which no copies are made, so float32 alone is compared


@dataclass(frozen=True)
class Trial:
    """One input on which model and source are compared.

    Args:
        name: what the report calls it.
        tensors: the input's tensors; floating ones are cast to the precision under test.
        run_model: ``run_model(model, *tensors)`` gives the converted model's output.
        run_source: ``run_source(source, *tensors)`` gives the source's.
    """

    name: str
    tensors: tuple[Tensor, ...]
    run_model: Callable[..., Tensor]
    run_source: Callable[..., Tensor]


def series_trials(
    n_channels: int, n_time: int, masked: bool, seed: int = 0
) -> tuple[tuple[str, tuple[Tensor, ...]], ...]:
    """Names and inputs for a model of series: random, large, constant and, if asked, padded.

    Args:
        n_channels: channels of a series.
        n_time: samples of a series.
        masked: whether the source takes masks; a padded batch is then among the inputs.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (8, n_channels, n_time)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    constant = normal[:, :, :1].expand(shape).clone()
    inputs: list[tuple[str, tuple[Tensor, ...]]] = [
        (f"random {list(shape)}", (normal,)),
        (f"random {list(shape)} times 10 plus 3", (10 * normal + 3,)),
        (f"constant {list(shape)}", (constant,)),
    ]
    if masked:
        lengths = torch.linspace(max(1, n_time // 3), n_time, 8).round().long()
        mask = torch.arange(n_time)[None] < lengths[:, None]
        inputs.append((f"padded {list(shape)}", (normal, mask)))
    return tuple(inputs)


@checked
def check_parity(
    model: HookedTST, source: nn.Module, trials: Sequence[Trial], source_name: str
) -> Parity:
    """Compare the outputs of both on every trial, in float32 and in float64.

    Copies are compared, so the source is left as it was. Models of ``LARGE`` parameters or more
    run themselves instead, in the precision they have, and in that one only: a conversion then
    holds no more than the source and the converted model.

    Args:
        model: the converted model; left as it was.
        source: its source.
        trials: the inputs.
        source_name: what the report calls the source.
    """
    single = torch.float32
    if sum(weight.numel() for weight in source.parameters()) >= LARGE and model.cfg.dtype == single:
        with eval_mode(source):
            worst = [_worst(model, source, trials, single, model.cfg.device), (None, None)]
    else:
        worst = [
            _worst(_as(model, dtype), _as(source, dtype), trials, dtype, "cpu")
            for dtype in (single, torch.float64)
        ]
    return Parity(
        max_abs=worst[0][1] or 0.0,
        max_rel=worst[0][0] or 0.0,
        tolerance=TOLERANCE,
        max_abs_float64=worst[1][1],
        max_rel_float64=worst[1][0],
        tolerance_float64=TOLERANCE_FLOAT64,
        inputs=tuple(trial.name for trial in trials),
        source=source_name,
    )


def _worst(
    model: Any, source: Any, trials: Sequence[Trial], dtype: torch.dtype, device: Any
) -> tuple[float | None, float | None]:
    """The largest difference over all trials, relative and absolute."""
    worst = (0.0, 0.0)
    for trial in trials:
        tensors = [
            t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)
            for t in trial.tensors
        ]
        with torch.no_grad():
            ours, theirs = trial.run_model(model, *tensors), trial.run_source(source, *tensors)
        worst = max(worst, relative_difference(ours, theirs), key=_badness)
    return worst


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[nn.Module]:
    """A module in eval mode for a while; each submodule's own mode comes back."""
    training = {part: part.training for part in module.modules()}
    try:
        yield module.eval()
    finally:
        for part, was_training in training.items():
            part.training = was_training


def _as(module: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(module).to(dtype=dtype, device="cpu").eval()


def relative_difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Largest difference relative to the source's largest output, and absolute."""
    if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
        return float("inf"), float("inf")
    absolute = float((ours - theirs).abs().max())
    scale = float(theirs.abs().max())
    return absolute / scale if scale else absolute, absolute


def _badness(difference: tuple[float, float]) -> float:
    return float("inf") if difference[0] != difference[0] else difference[0]
