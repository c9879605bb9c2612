"""The parity check: the converted model and its source on the same inputs, in two precisions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.arguments import checked
from tstlens.model import HookedTST, Parity

TOLERANCE = 1e-5  # of the output's scale, float32: rebuilt transformers land at 1e-7 to 5e-6
ROUNDINGS = 4  # times the source's own rounding error are allowed; 2.3 is the worst that was seen
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
    n_channels: int, n_time: int, masked: bool, scaled: bool = True, seed: int = 0
) -> tuple[tuple[str, tuple[Tensor, ...]], ...]:
    """Names and inputs for a model of series: random, large, constant and, if asked, padded.

    Args:
        n_channels: channels of a series.
        n_time: samples of a series.
        masked: whether the source takes masks; a padded batch is then among the inputs.
        scaled: whether the source scales series itself; elsewhere large values would only show how
            coarsely they round, so that they are less large.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (8, n_channels, n_time)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    constant = normal[:, :, :1].expand(shape).clone()
    times, plus = (10, 3) if scaled else (2, 1)
    inputs: list[tuple[str, tuple[Tensor, ...]]] = [
        (f"random {list(shape)}", (normal,)),
        (f"random {list(shape)} times {times} plus {plus}", (times * normal + plus,)),
        (f"constant {list(shape)}", (constant,)),
    ]
    if masked:
        lengths = torch.linspace(max(1, n_time // 3), n_time, 8).round().long()
        mask = torch.arange(n_time)[None] < lengths[:, None]
        inputs.append((f"padded {list(shape)}", (normal, mask)))
    return tuple(inputs)


def context_trials(
    embed: Any,
    n_channels: int | None,
    run_source: Callable[..., Tensor],
    kinds: Sequence[str] = ("large", "constant", "missing", "padded", "shorter"),
    n_patches: int = 16,
    least: int = 1,
) -> tuple[Trial, ...]:
    """Trials for a model of patches with a context, that takes missing values.

    Args:
        embed: the front end's config, with ``context_length`` and ``patch_len``.
        n_channels: channels of a series.
        run_source: ``run_source(source, series)`` gives the source's output.
        kinds: which series.
        n_patches: most patches of a series.
        least: samples that are observed at least, where a series is padded at the start.
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(embed.context_length, n_patches * embed.patch_len)
    shape = (4, n_channels or 1, longest)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    missing, padded, empty = normal.clone(), normal.clone(), normal.clone()
    missing[torch.rand(shape, generator=generator) < 0.3] = torch.nan
    for row, before in enumerate((0, 1, longest // 2, longest - min(longest, least))):
        padded[row, :, :before] = torch.nan
    empty[0] = torch.nan
    ended = missing.clone()
    ended[..., -1] = 1.0
    shorter = normal[..., -max(1, longest - embed.patch_len // 2) :].clone()
    given = {
        "large": (f"random {list(shape)} times 10 plus 3", 10 * normal + 3),
        "never negative": (f"never negative {list(shape)}", normal.abs()),
        "constant": (f"constant {list(shape)}", normal[..., :1].expand(shape).clone()),
        "missing": (f"missing values {list(shape)}", missing),
        "missing inside": (f"missing values {list(shape)}", ended),
        "padded": (f"padded at the start {list(shape)}", padded),
        "shorter": (f"no whole number of patches {list(shorter.shape)}", shorter),
        "empty": (f"one without observed values {list(shape)}", empty),
    }
    return tuple(Trial(given[k][0], (given[k][1],), run_model, run_source) for k in kinds)


def run_model(model: HookedTST, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The hooked model's output, for trials."""
    return model(series, mask=mask)


@checked
def check_parity(
    model: HookedTST, source: nn.Module, trials: Sequence[Trial], source_name: str
) -> Parity:
    """Compare the outputs of both on every trial, in float32 and in float64.

    In float32 the source itself is off by its rounding (its output there against its output in
    float64), and what rounds otherwise cannot be nearer to it than that: on each trial a difference
    of ``max(1e-5, 4 * rounding)`` of the output's scale is allowed. In float64 it is 1e-10.

    Copies are compared, so the source is left as it was. Models of ``LARGE`` parameters or more
    run themselves instead, in float32 alone (a conversion then holds no more than the source and
    the converted model), unless a difference is beyond 1e-5.

    Args:
        model: the converted model; left as it was.
        source: its source.
        trials: the inputs.
        source_name: what the report calls the source.
    """
    found = None
    large = sum(weight.numel() for weight in source.parameters()) >= LARGE
    if large and model.cfg.dtype == torch.float32:
        with eval_mode(source):
            pair = _outputs(model, source, trials, torch.float32, model.cfg.device)
        found = _measured([pair], trials, source_name)
    if found is None or not found.passed:
        pairs = [
            _outputs(_as(model, dtype), _as(source, dtype), trials, dtype, "cpu")
            for dtype in (torch.float32, torch.float64)
        ]
        found = _measured(pairs, trials, source_name)
    return found


_Pair = tuple[list[Tensor], list[Tensor]]  # ours and the source's, one output per trial


def _outputs(
    model: Any, source: Any, trials: Sequence[Trial], dtype: torch.dtype, device: Any
) -> _Pair:
    ours, theirs = [], []
    for trial in trials:
        tensors = [
            t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)
            for t in trial.tensors
        ]
        with torch.no_grad():
            ours.append(trial.run_model(model, *tensors))
            theirs.append(trial.run_source(source, *tensors))
    return ours, theirs


def _measured(pairs: Sequence[_Pair], trials: Sequence[Trial], source_name: str) -> Parity:
    """The report from the outputs in float32 and, where they are there, in float64.

    Of the float32 differences it holds the one that is nearest to its limit, or farthest beyond.
    """
    single = [relative_difference(*both) for both in zip(*pairs[0], strict=True)]
    double, rounding = [], [0.0] * len(trials)
    for _, theirs in pairs[1:]:
        double = [relative_difference(*both) for both in zip(*pairs[1], strict=True)]
        rounding = [
            relative_difference(rough.double(), fine)[0]
            for rough, fine in zip(pairs[0][1], theirs, strict=True)
        ]
    limits = [max(TOLERANCE, ROUNDINGS * own if math.isfinite(own) else 0.0) for own in rounding]
    nearest = max(range(len(trials)), key=lambda i: _badness(single[i]) / limits[i], default=None)
    worst = (0.0, 0.0) if nearest is None else single[nearest]
    worst64 = max(double, key=_badness, default=(None, None))
    return Parity(
        max_abs=worst[1],
        max_rel=worst[0],
        tolerance=TOLERANCE if nearest is None else limits[nearest],
        max_abs_float64=worst64[1],
        max_rel_float64=worst64[0],
        tolerance_float64=TOLERANCE_FLOAT64,
        inputs=tuple(trial.name for trial in trials),
        source=source_name,
        source_rounding=rounding[nearest] if double and nearest is not None else None,
    )


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
