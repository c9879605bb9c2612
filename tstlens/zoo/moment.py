"""Family ``moment``: MOMENT of the package momentfm, live, or weights with its config.

| source (momentfm.models.moment)              | here                                              |
|----------------------------------------------|---------------------------------------------------|
| ``normalizer`` (RevIN; keeps its statistics) | ``embed.hook_loc``, ``embed.hook_scale``,         |
|                                              | ``embed.hook_scaled``; carried by ``TrunkState``  |
| ``tokenizer``                                | ``embed.hook_patches``                            |
| ``patch_embedding.value_embedding``          | ``embed.W_E``                                     |
| ``patch_embedding.mask_embedding``, ``mask=``| ``embed.mask_embedding``, ``embed.hook_visible``  |
| ``patch_embedding.position_embedding``       | ``pos_embed``, ``hook_pos_embed``                 |
| ``encoder`` (a T5 stack)                     | ``blocks`` (see ``t5_layers``), ``ln_final``      |
| ``head``                                     | ``head`` (``head.hook_pooled``,                   |
|                                              | ``head.hook_scaled``)                             |

Covered: tasks reconstruction, forecasting, classification (channels concatenated or averaged) and
embedding; affine RevIN; a bias of the patch embedding; without sinusoids; every activation of T5
that is ReLU, GELU or SiLU, gated or not; ``input_mask`` (our ``mask``), missing values (NaN).
The channel count belongs to the series, not to the weights (a concatenating classifier excepted):
give ``n_channels=``.

Differences on purpose: location and scale are never kept on a module; random masking
(``mask_ratio`` above 0) does not happen, patches are hidden by a hook at ``embed.hook_visible``.
Where reconstruction is not told which patches to hide, the source hides those with padding in
them, counted in patches of 8 samples whatever ``patch_len`` is; here it is by ``patch_len``.

Refused: overlapping patches (the source builds its masks for patches that do not overlap, and
fails), ``transformer_type`` other than ``encoder_only`` (the source then calls an encoder with a
decoder's arguments, and fails), series that are no whole number of patches.

Front end and head of MOMENT: reversible instance norm, patches, one head per task.

What the source does with a mask is kept exactly, and it differs between tasks. A patch counts as
observed where all of its samples are; the others are padding to attention in every task. Their
embedding is the mask embedding (a learned vector), except in forecasting, where it is that of
whatever samples stand there. Heads that flatten or average positions take padded ones in, except
for the embedding task. Reconstruction takes location and scale from whole observed patches, the
others from all observed samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.norms import watched
from tstlens.model.parts import one_of, positive
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import fill
from tstlens.zoo.parity import Trial, run_model, series_trials
from tstlens.zoo.parts import OwnCells, per_channel
from tstlens.zoo.parts import observed_mean_and_std as mean_and_std
from tstlens.zoo.registry import Built, class_of, register_classes
from tstlens.zoo.t5 import (
    dotted,
    fill_stack,
    in_full_precision,
    read_t5,
    showing_patterns,
    stack_taps,
)
from tstlens.zoo.transformers_source import live_or_rebuilt, load_weights

MomentTask = Literal["reconstruction", "forecasting", "classification", "embedding"]
TASKS = ("reconstruction", "forecasting", "classification", "embedding")


@dataclass(frozen=True)
class MomentPatchesConfig(OwnCells):
    """MOMENT's front end: scale each channel, cut it into patches, map each patch linearly.

    Args:
        patch_len: samples in one patch; patches do not overlap.
        task: what the model is for, which decides what padding does (see the module).
        bias: whether the linear map has a bias.
        affine: whether the scaled series is multiplied and shifted by learned numbers.
        eps: added to the standard deviation.
    """

    patch_len: int
    task: MomentTask
    bias: bool = False
    affine: bool = False
    eps: float = 1e-5
    kind: str = "moment-patches"
    channel_independent: bool = True
    takes_missing: bool = True

    def __post_init__(self) -> None:
        positive("MomentPatchesConfig", patch_len=self.patch_len)
        one_of("MomentPatchesConfig.task", self.task, TASKS)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return n_time // self.patch_len

    def check(self, n_time: int) -> None:
        """Raise :class:`SeriesShapeError` unless the samples divide into patches."""
        if n_time % self.patch_len:
            raise SeriesShapeError(
                f"expected a whole number of patches of {self.patch_len} samples, got {n_time} "
                "samples; cut the series, or pad it and pass mask="
            )

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from."""
        return slice(pos * self.patch_len, (pos + 1) * self.patch_len)

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""
        return MomentPatches(self, cfg.d_model)


@dataclass(frozen=True)
class MomentHeadConfig:
    """MOMENT's head.

    Args:
        task: ``"reconstruction"`` maps every position to its patch, ``"forecasting"`` all positions
            of a channel to the horizon, ``"classification"`` the mean over positions to logits, and
            ``"embedding"`` averages over channels and observed positions.
        patch_len: samples in one patch.
        n_classes: logits, of a classifier.
        horizon: steps, of a forecaster.
        reduction: how a classifier joins channels: ``"concat"`` or ``"mean"``.
    """

    task: MomentTask
    patch_len: int
    n_classes: int | None = None
    horizon: int | None = None
    reduction: Literal["concat", "mean"] = "concat"
    kind: str = "moment-head"

    def __post_init__(self) -> None:
        one_of("MomentHeadConfig.task", self.task, TASKS)
        one_of("MomentHeadConfig.reduction", self.reduction, ("concat", "mean"))
        needed = {"classification": "n_classes", "forecasting": "horizon"}.get(self.task)
        for name in ("n_classes", "horizon"):
            value = getattr(self, name)
            if name == needed and value is not None:
                positive("MomentHeadConfig", **{name: value})
            elif (name == needed) != (value is not None):
                raise ArgumentError(
                    f"a {self.task} head takes {needed or 'neither n_classes nor horizon'}, "
                    f"got {name}={value}"
                )

    @property
    def pooling(self) -> str | None:
        """How positions are pooled; None where every position has an output of its own."""
        pooled = {"forecasting": "flatten", "classification": "mean", "embedding": "mean"}
        return pooled.get(self.task)

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return MomentHead(self, cfg)


class MomentPatches(nn.Module):
    """From a series to positions, one row per channel; ``W_E`` is [patch_len, d_model].

    ``hook_visible`` holds 1 for patches that are embedded and 0 for those that become the mask
    embedding, so a hook there asks the model to fill a stretch in (with reconstruction the hidden
    patches are also left out of location and scale, as in the source).
    """

    def __init__(self, cfg: MomentPatchesConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_E = nn.Parameter(torch.zeros(cfg.patch_len, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=cfg.bias)
        self.mask_embedding = nn.Parameter(torch.zeros(d_model))
        if cfg.affine:
            self.w = nn.Parameter(torch.ones(1))
            self.b = nn.Parameter(torch.zeros(1))
        self.hook_visible = Hook("batch channel pos 1")
        self.hook_loc = Hook("batch channel 1")
        self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")
        self.hook_patches = Hook("batch channel pos patch_len")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        batch, n_channels, n_time = series.shape
        n_pos = self.cfg.n_pos(n_time)
        whole = None  # bool [batch, pos], True where every sample of a patch is observed
        if mask is not None:
            whole = mask.unflatten(1, (n_pos, self.cfg.patch_len)).all(-1)
        visible = self._visible(whole, (batch, n_channels, n_pos, 1), series)
        missing = series.isnan()
        observed = self._counted(mask, visible, missing)
        if not bool(observed.any(-1).all()):
            row, channel = (int(i) for i in (~observed.any(-1)).nonzero()[0])
            raise SeriesValueError(
                f"expected an observed sample in every channel, got none in series {row}, channel "
                f"{channel}, that MOMENT counts (for reconstruction, samples of whole observed "
                "patches); leave the channel out"
            )
        loc, std = mean_and_std(series, observed)
        loc = self.hook_loc(loc)
        scale = self.hook_scale(std + self.cfg.eps)
        scaled = (torch.where(missing, 0.0, series) - loc) / scale
        statistics = {"loc": loc.flatten(0, 1), "scale": scale.flatten(0, 1)}
        if self.cfg.affine:
            scaled = scaled * self.w + self.b
            statistics |= {
                name: getattr(self, name).expand(len(loc) * n_channels, 1) for name in "wb"
            }
        scaled = self.hook_scaled(torch.where(missing, 0.0, scaled))
        patches = self.hook_patches(scaled.unflatten(2, (n_pos, self.cfg.patch_len)))
        x = patches @ self.W_E + self.b_E  # [batch, channel, pos, d_model]
        if visible is not None:
            x = visible * x + (1 - visible) * self.mask_embedding
        pos_mask = None if whole is None else whole.repeat_interleave(n_channels, 0)
        state = TrunkState(pos_mask, n_channels, statistics=statistics)
        return x.flatten(0, 1), state

    def _visible(
        self, whole: Tensor | None, shape: tuple[int, int, int, int], like: Tensor
    ) -> Tensor | None:
        """[batch, channel, pos, 1], 1 where a patch is embedded; None where all are."""
        hidden = whole is not None and self.cfg.task != "forecasting"
        if not hidden and not watched(self.hook_visible):
            return None
        visible = like.new_ones(shape)
        if hidden and whole is not None:
            visible = visible * whole[:, None, :, None]
        return self.hook_visible(visible)

    def _counted(self, mask: Mask | None, visible: Tensor | None, missing: Tensor) -> Tensor:
        """bool [batch, channel, time], True for samples that location and scale are taken from."""
        counted = ~missing
        if mask is not None:
            counted = counted & mask[:, None]
        if visible is not None and self.cfg.task == "reconstruction":
            shown = visible[..., 0] > 0
            counted = counted & shown.repeat_interleave(self.cfg.patch_len, 2)
        return counted


class MomentHead(nn.Module):
    """From the stream [row, pos, d_model] to what the task asks for, in the series' units.

    Reconstruction gives [batch, channel, time], forecasting [batch, channel, horizon],
    classification [batch, class], embedding [batch, d_model]. ``W_U`` of a classifier that
    concatenates channels is [channel * d_model, class], channel-major.
    """

    def __init__(self, cfg: MomentHeadConfig, model: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.n_ctx = model.n_ctx
        self.eps = getattr(model.embed, "eps", 0.0)
        n_channels = model.n_channels or 1
        sizes = {
            "reconstruction": (model.d_model, cfg.patch_len),
            "forecasting": (model.d_model * (model.n_ctx or 1), cfg.horizon or 0),
            "classification": (
                model.d_model * (n_channels if cfg.reduction == "concat" else 1),
                cfg.n_classes or 0,
            ),
        }
        if cfg.task in sizes:
            self.W_U = nn.Parameter(torch.zeros(*sizes[cfg.task]))
            self.b_U = nn.Parameter(torch.zeros(sizes[cfg.task][1]))
        if cfg.task != "reconstruction":
            self.hook_pooled = Hook("row pooled")  # d_model, or pos * d_model when flat
        if cfg.task in ("reconstruction", "forecasting"):
            self.hook_scaled = Hook("batch channel time")

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        n_channels = state.n_series_channels
        if self.cfg.task == "reconstruction":
            return self._unscaled((residual @ self.W_U + self.b_U).flatten(1), state)
        if self.cfg.task == "forecasting":
            if residual.shape[1] != self.n_ctx:
                raise SeriesShapeError(
                    f"this forecast head takes exactly {self.n_ctx} positions, got "
                    f"{residual.shape[1]}"
                )
            pooled = self.hook_pooled(residual.flatten(1))
            return self._unscaled(pooled @ self.W_U + self.b_U, state)
        if self.cfg.task == "embedding":
            pooled = self.hook_pooled(_observed_mean(residual, state.pos_mask))
            return pooled.unflatten(0, (-1, n_channels)).mean(1)
        pooled = self.hook_pooled(residual.mean(1)).unflatten(0, (-1, n_channels))
        joined = pooled.flatten(1) if self.cfg.reduction == "concat" else pooled.mean(1)
        return joined @ self.W_U + self.b_U

    def _unscaled(self, x: Tensor, state: TrunkState) -> Tensor:
        """[row, sample] in scaled units as [batch, channel, sample] in the series' units."""
        names = ["scale", "loc", *(name for name in "wb" if name in state.statistics)]
        given = {n: x[..., 0] for n, x in zip(names, per_channel(state, *names), strict=True)}
        x = self.hook_scaled(x.unflatten(0, (-1, state.n_series_channels)))
        if "w" in given:
            x = (x - given["b"]) / (given["w"] + self.eps * self.eps)
        return x * given["scale"] + given["loc"]


def _observed_mean(residual: Residual, pos_mask: Tensor | None) -> Tensor:
    if pos_mask is None:
        return residual.mean(1)
    weight = pos_mask[:, :, None].to(residual.dtype)
    return (weight * residual).sum(1) / weight.sum(1)


_CLASSES = ("momentfm.models.moment.MOMENT", "momentfm.models.moment.MOMENTPipeline")
_HEADS = {
    "reconstruction": "momentfm.models.moment.PretrainHead",
    "forecasting": "momentfm.models.moment.ForecastingHead",
    "classification": "momentfm.models.moment.ClassificationHead",
    "embedding": "torch.nn.modules.linear.Identity",
}


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int | None = None,
    config: Mapping[str, Any] | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert a MOMENT model.

    Args:
        source: the model, or its state dict.
        n_channels: channels of the series it will be given (1 where not given); a classifier that
            concatenates channels knows.
        config: what the source was made with (state dict only, needed there): the entries of its
            ``config.json`` and ``model_kwargs``, such as ``task_name``.
        class_names: one name per logit.
    """
    whole = live_or_rebuilt(source, config, _rebuild)
    task = _check(whole)
    embedding, head = whole.patch_embedding, whole.head
    reduction = whole.config.getattr("reduction", "concat")
    n_channels = _channels(whole, task, reduction, n_channels)
    options = read_t5(whole.encoder)
    if whole.encoder.config.is_decoder:
        raise UnsupportedSourceError("the T5 stack is a decoder; MOMENT's is an encoder")
    patch_len = embedding.patch_len
    n_time, n_ctx, positions = None, None, "none"
    if task == "forecasting":
        n_time = whole.seq_len
    if embedding.add_positional_embedding:
        positions = "sinusoidal"
        n_ctx = embedding.position_embedding.pe.shape[1] if n_time is None else None
    cfg = HookedTSTConfig(
        embed=MomentPatchesConfig(
            patch_len=patch_len,
            task=task,
            bias=embedding.value_embedding.bias is not None,
            affine=bool(whole.normalizer.affine),
            eps=whole.normalizer.eps,
        ),
        head=MomentHeadConfig(
            task=task,
            patch_len=patch_len,
            n_classes=head.linear.out_features if task == "classification" else None,
            horizon=head.linear.out_features if task == "forecasting" else None,
            reduction=reduction,
        ),
        n_channels=n_channels,
        n_time=n_time,
        n_ctx=n_ctx,
        positions=positions,
        class_names=class_names,
        model_name="MOMENT",
        **options,
    )
    weight = embedding.value_embedding.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole, task, n_channels)
    return Built(model, whole, _trials(whole, cfg), dotted(whole))


def _check(source: Any) -> Any:
    """The task, or the option that is not covered."""
    overridden = {"forward", "__call__", *TASKS, "forecast", "classify", "embed"} & set(
        vars(source)
    )
    if overridden:
        raise UnsupportedSourceError(
            f"this MOMENT has {', '.join(sorted(overridden))} of its own, which may compute "
            "something else"
        )
    task = source.task_name
    if task not in TASKS:
        raise UnsupportedSourceError(f"task_name {task!r} is not covered; {', '.join(TASKS)} are")
    if dotted(source.head) != _HEADS[task]:
        raise UnsupportedSourceError(
            f"expected the {task} head {_HEADS[task]}, got {dotted(source.head)}; after loading "
            "with a task_name, call .init(), which replaces the head"
        )
    config = source.config
    if config.transformer_type != "encoder_only":
        raise UnsupportedSourceError(
            f"transformer_type {config.transformer_type!r} is not covered (the source fails in its "
            "own forward pass); encoder_only is"
        )
    if config.patch_stride_len != config.patch_len:
        raise UnsupportedSourceError(
            f"patch_stride_len={config.patch_stride_len} differs from patch_len="
            f"{config.patch_len}: the source builds its masks for patches that do not overlap"
        )
    return task


def _channels(source: Any, task: str, reduction: str, given: int | None) -> int:
    if task != "classification" or reduction != "concat":
        return given or 1
    known = source.head.linear.in_features // source.encoder.config.d_model
    if given not in (None, known):
        raise ArgumentError(
            f"n_channels={given}, but this classifier concatenates {known} channels; leave it out"
        )
    return known


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any, task: str, n_channels: int) -> None:
    embedding = source.patch_embedding
    weights = {
        "W_E": embedding.value_embedding.weight.T,
        "mask_embedding": embedding.mask_embedding,
    }
    if embedding.value_embedding.bias is not None:
        weights["b_E"] = embedding.value_embedding.bias
    if source.normalizer.affine:
        weights["w"] = source.normalizer.affine_weight.flatten()
        weights["b"] = source.normalizer.affine_bias.flatten()
    fill(model.embed, weights)
    if embedding.add_positional_embedding:
        table = embedding.position_embedding.pe[0, : model.pos_embed.n_ctx]
        fill(model.pos_embed, {"W_pos": table})
    fill_stack(model.blocks, model.position_bias, model.ln_final, source.encoder)
    if task == "embedding":
        return
    weight = source.head.linear.weight.T
    if task == "classification" and weight.shape[0] != model.cfg.d_model:
        by_channel = weight.unflatten(0, (-1, n_channels))  # the source puts d_model before channel
        weight = by_channel.transpose(0, 1).flatten(0, 1)
    fill(model.head, {"W_U": weight, "b_U": source.head.linear.bias})


def run(source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's output for a series [batch, channel, time], no patch hidden at random."""
    given = torch.ones_like(series[:, 0]) if mask is None else mask.to(series.dtype)
    arguments: dict[str, Any] = {"x_enc": series, "input_mask": given}
    if source.task_name == "reconstruction":
        shown = given.unflatten(1, (-1, source.patch_len)).amin(-1)
        arguments["mask"] = shown.repeat_interleave(source.patch_len, 1)
    if source.task_name == "classification":
        arguments["reduction"] = source.config.getattr("reduction", "concat")
    with in_full_precision(source, series.dtype), showing_patterns(source):
        out = source(**arguments)
    entry = {"forecasting": "forecast", "classification": "logits", "embedding": "embeddings"}
    return getattr(out, entry.get(source.task_name, "reconstruction"))


def _trials(source: Any, cfg: HookedTSTConfig) -> tuple[Trial, ...]:
    n_channels, patch_len = cfg.n_channels or 1, source.patch_len
    n_time = cfg.n_time or min(source.seq_len, 32 * patch_len) // patch_len * patch_len
    given = list(series_trials(n_channels, n_time, masked=False))
    normal = given[0][1][0]
    n_pos = n_time // patch_len
    lengths = torch.linspace(min(n_pos, max(1, n_pos // 3)), n_pos, 8).round().long() * patch_len
    lengths[1:-1] = (lengths[1:-1] + patch_len // 2).clamp(max=n_time)  # ends inside a patch
    mask = torch.arange(n_time)[None] < lengths[:, None]
    given.append((f"padded {list(normal.shape)}", (normal, mask)))
    holes = normal.clone()
    holes[:, :, 1::5] = torch.nan
    given.append((f"missing values {list(normal.shape)}", (holes,)))
    return tuple(Trial(name, tensors, run_model, run) for name, tensors in given)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a MOMENT computes our activations."""
    found = [
        Tap("embed.hook_patches", "patch_embedding", of="input"),
        *stack_taps("encoder", "blocks", source.encoder, model),
        Tap("ln_final.hook_normalized", "encoder.final_layer_norm", _unweighted(source)),
    ]
    if source.task_name == "forecasting":
        found.append(Tap("head.hook_pooled", "head.flatten", lambda seen: seen.flatten(0, 1)))
        found.append(Tap("head.hook_scaled", "head"))
    if source.task_name == "reconstruction":
        found.append(Tap("head.hook_scaled", "head"))
    return found


def _unweighted(source: Any) -> Any:
    weight = source.encoder.final_layer_norm.weight.detach()
    return lambda seen: seen / weight


_PIPELINE = "momentfm.MOMENTPipeline"  # install with --no-deps: its pins are old
_UNUSED = ("encoder.embed_tokens.weight", "encoder.shared.weight", "encoder.shared")


def _rebuild(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    entries = dict(config)
    made = {"d_model": None, **entries, "task_name": "reconstruction"}
    source = class_of(_PIPELINE)(made, model_kwargs=dict(entries))
    source.init()  # puts the head of the entries' task in the place of the pretrained one
    load_weights(source, state, "moment", _UNUSED)
    return source


def load(folder: Path) -> nn.Module:
    """A MOMENT from a folder that its ``save_pretrained`` wrote, for reconstruction."""
    return class_of(_PIPELINE).from_pretrained(str(folder)).eval()


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a MOMENT's."""
    return {"t5_config", "patch_len", "transformer_backbone"} <= set(config)


FAMILY = register_classes("moment", _CLASSES, build, run, taps, reads=reads, load=load)
