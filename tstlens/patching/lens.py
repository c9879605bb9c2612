"""The lens: what the head would say if the stream stopped here.

The final norm and the head are applied to the residual stream between the sublayers, so that the
depth at which a decision is made can be read in the model's own output space: classes, or a
forecast in the units of the series.

The head was trained on the last stream only. On the way there its reading is a heuristic: early
streams may hold what matters in directions that the head does not read. In a post-norm model each
sublayer's sum is also rescaled and shifted by its norm, with other weights each time, so readings
before the last rest on the bet that the blocks share a basis. The last point is the output itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import checked
from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.model import HookedTST, TrunkState
from tstlens.patching.checks import require_one_stack
from tstlens.patching.lens_result import LensResult
from tstlens.patching.sweep import time_cells

SERIES_PER_BLOCK = 64  # series whose activations are held at once

PRE_NORM = (
    "the head was trained on the last stream: earlier readings are a heuristic, the last is exact"
)
POST_NORM = (
    "heuristic: post-norm blocks rescale the stream after every sublayer, and the head fits what "
    "leaves the last; only that reading is exact"
)


@checked
@torch.no_grad()
def lens(
    model: HookedTST,
    series: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    by_pos: bool = False,
    progress: bool = True,
) -> LensResult:
    """Apply final norm and head to the residual stream before, within and after every block.

    It answers "how deep in the model is the decision made?". Points are ``resid_pre`` of block 0
    (the embedding), then ``resid_mid`` and ``resid_post`` of every block. In post-norm models they
    are what the norms make of these sums, which is what the model itself goes on with, and the
    result says that it is a heuristic.

    What can mislead: the head was trained on the last stream, so a low early accuracy does not say
    that the information is not there (a probe would tell); with a max pooling the winners differ
    from point to point; and accuracy early on may be the embedding's alone.

    Args:
        model: the model; its head may be any.
        series: float [batch, channel, time].
        target: int [batch] classes, or a forecast's true values [batch, channel, horizon] in the
            units of the series; None for no comparison.
        mask: bool [batch, time], True where observed.
        by_pos: also read every position by itself, as if it were the only one (not for a flatten
            head, whose positions have weights of their own, nor for a head of the user's own).
        progress: show a progress bar where it takes longer than a second.

    Returns:
        Outputs [point, series, class] or [point, series, channel, horizon], with probabilities,
        accuracy, distance from the final output, a frame and a figure.

    Raises:
        LabelError, SeriesShapeError: a target that does not fit.
        ArgumentError: no series, ``by_pos`` where the head does not allow it, or a model with an
            encoder and a decoder.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023,
        arXiv 2303.08112, on how it misleads.

    Example:
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> read = patching.lens(model, torch.randn(8, 3, 20), torch.zeros(8, dtype=torch.long))
        >>> read.points
        ('embed', 'L0 attn', 'L0 MLP', 'L1 attn', 'L1 MLP')
        >>> read.accuracy().shape
        torch.Size([5])
    """
    require_one_stack(model, "lens")
    model.check_series(series, mask)
    series = blanked(series, mask)
    if not len(series):
        raise ArgumentError("expected at least one series, got none")
    if by_pos:
        _check_by_pos(model)
    outputs, each_pos, finals, observed = [], [], [], []
    starts = range(0, len(series), SERIES_PER_BLOCK)
    for start in tqdm(starts, desc="lens", unit="block", disable=not progress, delay=1):
        rows = slice(start, start + SERIES_PER_BLOCK)
        seen = None if mask is None else mask[rows]
        stream, state, final = streams(model, series[rows], seen)
        outputs.append(torch.stack([model.unembed(point, state) for point in stream]))
        finals.append(final)
        if by_pos:
            each_pos.append(torch.stack([_at_each_pos(model, point, state) for point in stream]))
            observed.append(_observed(state, stream[0]))
    output = torch.cat(outputs, 1)
    classifies = model.cfg.n_classes is not None or output.ndim == 3
    _check_target(target, output, classifies)
    return LensResult(
        output=output,
        points=point_names(model.cfg.n_layers),
        kind="classes" if classifies else "forecast",
        target=target,
        final=torch.cat(finals),
        heuristic=POST_NORM if model.cfg.norm_position == "post" else PRE_NORM,
        by_pos=torch.cat(each_pos, 1) if by_pos else None,
        observed=torch.cat(observed) if by_pos else None,
        series=None if classifies else series,
        time_cells=time_cells(model, series.shape[2]),
        class_names=model.cfg.class_names,
        made={"model": model.cfg.model_name, "norm_position": model.cfg.norm_position},
    )


def point_names(n_layers: int) -> tuple[str, ...]:
    """Where the lens reads: after the embedding and after every sublayer."""
    after = [f"L{layer} {sublayer}" for layer in range(n_layers) for sublayer in ("attn", "MLP")]
    return ("embed", *after)


def streams(
    model: HookedTST, series: Tensor, mask: Tensor | None
) -> tuple[list[Tensor], TrunkState, Tensor]:
    """The stream at every point of the lens, the state of its rows, and the model's own output."""
    names = ["blocks.0.hook_resid_pre", *_names(model)]
    residual, state = model.embed_series(series, mask)
    output, cache = model.run_with_cache(
        residual, state=state, start_at_layer=0, names_filter=names, return_cache_object=False
    )
    stream = [cache[name] for name in names]
    if model.cfg.norm_position == "post":  # what was cached at ln1 lacks its weight and bias
        for layer in range(model.cfg.n_layers):
            norm: Any = model.blocks[layer].ln1
            at = 1 + 2 * layer
            stream[at] = stream[at] * norm.w + getattr(norm, "b", 0.0)
    return stream, state, output


def _names(model: HookedTST) -> Sequence[str]:
    mid, post = ("ln1.hook_normalized", "hook_normalized_resid_post")
    if model.cfg.norm_position == "pre":
        mid, post = "hook_resid_mid", "hook_resid_post"
    return [f"blocks.{layer}.{leaf}" for layer in range(model.cfg.n_layers) for leaf in (mid, post)]


def _at_each_pos(model: HookedTST, stream: Tensor, state: TrunkState) -> Tensor:
    """The output of every position read by itself, [series, pos, *output]."""
    alone = TrunkState(n_series_channels=state.n_series_channels, statistics=state.statistics)
    return torch.stack([model.unembed(pos[:, None], alone) for pos in stream.unbind(1)], 1)


def _observed(state: TrunkState, stream: Tensor) -> Tensor:
    """bool [series, pos], False at padding."""
    if state.pos_mask is None:
        n_series = len(stream) // state.n_series_channels
        return torch.ones(n_series, stream.shape[1], dtype=torch.bool, device=stream.device)
    return state.pos_mask[:: state.n_series_channels]


def _check_by_pos(model: HookedTST) -> None:
    pooling = getattr(model.cfg.head, "pooling", None)
    if pooling in (None, "flatten"):
        kind = "is a module of your own" if pooling is None else "has weights for every position"
        raise ArgumentError(
            f"by_pos=True reads each position as if it were the only one, and this head {kind}; "
            "leave it out, or see patching.logit_attribution for what each position wrote"
        )


def _check_target(target: Any, output: Tensor, classifies: bool) -> None:
    if target is None:
        return
    shape = output.shape[1:]
    if not classifies:
        if target.shape != shape or not target.is_floating_point():
            raise SeriesShapeError(
                f"expected a target like the forecast, float {list(shape)}, got {target.dtype} "
                f"{list(target.shape)}"
            )
        return
    if target.shape != shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise LabelError(
            f"expected a target as integers [batch={shape[0]}], got {target.dtype} "
            f"{list(target.shape)}"
        )
    bad = target[(target < 0) | (target >= shape[1])]
    if len(bad):
        raise LabelError(f"expected targets in 0..{shape[1] - 1}, got {int(bad[0])}")
