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
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial, series_trials
from tstlens.conversion.comparing import Tap
from tstlens.conversion.encoder_layers import check_keys, fill
from tstlens.conversion.registry import Built, Family, register
from tstlens.conversion.t5_layers import (
    dotted,
    fill_stack,
    in_full_precision,
    read_t5,
    showing_patterns,
    stack_taps,
)
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.families.moment import TASKS, MomentHeadConfig, MomentPatchesConfig

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
    if isinstance(source, Mapping):
        source = _rebuild(source, config)
    elif config is not None:
        raise ArgumentError("config: a live MOMENT knows it itself; leave it out")
    whole: Any = source
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
    return Built(model, whole, _trials(whole, cfg), dotted(source))


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


def run(source: Any, series: Tensor, mask: Tensor | None) -> Tensor:
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


def _run_source(source: nn.Module, series: Tensor, mask: Tensor | None = None) -> Tensor:
    return run(source, series, mask)


def _run_model(model: HookedTST, series: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(series, mask=mask)


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
    return tuple(Trial(name, tensors, _run_model, _run_source) for name, tensors in given)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a MOMENT computes our activations."""
    found = [
        Tap("embed.hook_patches", "patch_embedding", of="input"),
        *stack_taps("encoder", "blocks", source.encoder),
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


def _rebuild(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> nn.Module:
    if config is None:
        raise ArgumentError(
            "the weights of a MOMENT do not tell its task and sizes; give config=, the entries of "
            "its config.json and model_kwargs"
        )
    entries = dict(config)
    source = _made(entries)
    expected = source.state_dict()
    unused = {"encoder.embed_tokens.weight", "encoder.shared.weight", "encoder.shared"}
    check_keys(
        {k: v for k, v in state.items() if k not in unused},
        {k: v for k, v in expected.items() if k not in unused},
        "moment",
    )
    source.to(dtype=state["patch_embedding.value_embedding.weight"].dtype)
    source.load_state_dict({k: v for k, v in state.items() if k not in unused}, strict=False)
    return source.eval()


def _made(entries: dict[str, Any]) -> nn.Module:
    config = {"d_model": None, **entries, "task_name": "reconstruction"}
    source = _pipeline()(config, model_kwargs=dict(entries))
    source.init()  # puts the head of the entries' task in the place of the pretrained one
    return source


def load(folder: Path) -> nn.Module:
    """A MOMENT from a folder that its ``save_pretrained`` wrote, for reconstruction."""
    return _pipeline().from_pretrained(str(folder)).eval()


def _pipeline() -> Any:
    try:
        momentfm = import_module("momentfm")
    except ImportError as error:
        raise ArgumentError(
            "a MOMENT's weights are compared with a MOMENT rebuilt from them, which needs its "
            "package: pip install --no-deps momentfm (its pins are old; it runs on current "
            "transformers and needs nothing else)"
        ) from error
    return momentfm.MOMENTPipeline


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a MOMENT's."""
    return {"t5_config", "patch_len", "transformer_backbone"} <= set(config)


def recognises(source: nn.Module) -> bool:
    """Whether a module is momentfm's own MOMENT, not a subclass."""
    return dotted(source) in _CLASSES


register(
    Family(
        name="moment",
        summary="MOMENT (momentfm): reconstruction, forecasting, classification, embedding; live, "
        "or weights with config=",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
