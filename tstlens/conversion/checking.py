"""The parity check: the converted model and its source on the same inputs, in two precisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.model import HookedTST, Parity

TOLERANCE = 1e-5  # of the output's scale, float32: rebuilt transformers land at 1e-7 to 5e-6
TOLERANCE_FLOAT64 = 1e-10


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


def check_parity(
    model: HookedTST, source: nn.Module, trials: Sequence[Trial], source_name: str
) -> Parity:
    """Compare the outputs of both on every trial, in float32 and in float64.

    Args:
        model: the converted model; left as it was.
        source: its source; left as it was (copies are compared, in eval mode).
        trials: the inputs.
        source_name: what the report calls the source.
    """
    worst = {torch.float32: (0.0, 0.0), torch.float64: (0.0, 0.0)}
    for dtype in worst:
        pair = _as(model, dtype), _as(source, dtype)
        for trial in trials:
            tensors = [t.to(dtype) if t.is_floating_point() else t for t in trial.tensors]
            with torch.no_grad():
                difference = _difference(
                    trial.run_model(pair[0], *tensors), trial.run_source(pair[1], *tensors)
                )
            worst[dtype] = max(worst[dtype], difference, key=_badness)
    (single_rel, single_abs), (double_rel, double_abs) = worst.values()
    return Parity(
        max_abs=single_abs,
        max_rel=single_rel,
        tolerance=TOLERANCE,
        max_abs_float64=double_abs,
        max_rel_float64=double_rel,
        tolerance_float64=TOLERANCE_FLOAT64,
        inputs=tuple(trial.name for trial in trials),
        source=source_name,
    )


def _as(module: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(module).to(dtype=dtype, device="cpu").eval()


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Largest difference relative to the source's largest output, and absolute."""
    if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
        return float("inf"), float("inf")
    absolute = float((ours - theirs).abs().max())
    scale = float(theirs.abs().max())
    return absolute / scale if scale else absolute, absolute


def _badness(difference: tuple[float, float]) -> float:
    return float("inf") if difference[0] != difference[0] else difference[0]
