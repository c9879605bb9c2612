"""Family ``patchtst``: Hugging Face's PatchTST, live, a folder, or a state dict with ``config=``.

| source (``transformers.models.patchtst``)       | here                                          |
|-------------------------------------------------|-----------------------------------------------|
| ``scaler`` (std, mean, none)                    | ``embed.hook_loc``, ``embed.hook_scale``,     |
|                                                 | ``embed.hook_scaled``                         |
| ``patchifier`` (leftover dropped at the start)  | ``embed.hook_patches``                        |
| ``masking`` (random there, told here)           | ``embed.hook_patch_mask``                     |
| ``encoder.embedder`` (shared or not), CLS token | ``hook_embed``                                |
| ``encoder.positional_encoder``                  | ``hook_pos_embed``                            |
| ``layers.l.self_attn`` over patches             | ``blocks.l.attn.*``, ``hook_attn_out``        |
| ``layers.l.self_attn`` again, over channels     | ``blocks.l.channel_attn.*`` (weights copied), |
| (``channel_attention``)                         | ``hook_channel_attn_out``                     |
| ``norm_sublayer1, 2, 3`` (batch or layer norm)  | ``ln1, ln2, ln3``; without channel attention  |
|                                                 | ``norm_sublayer3`` is ``ln2``                 |
| ``layers.l.ff``                                 | ``blocks.l.mlp.*``, ``hook_mlp_out``          |
| ``head``                                        | ``head.hook_pooled``, ``head.hook_scaled`` or |
|                                                 | ``head.hook_parameters``                      |

| class                        | output here                                                       |
|------------------------------|-------------------------------------------------------------------|
| ``PatchTSTForClassification``| logits [batch, class]                                             |
| ``PatchTSTForPrediction``    | [batch, channel, horizon] in the series' units; with a            |
|                              | distribution its parameters (last axis), also in these units      |
| ``PatchTSTForRegression``    | [batch, target]; with a distribution [batch, target, parameter]   |
| ``PatchTSTForPretraining``   | [batch, channel, patch, patch_len] in scaled units, no patch      |
|                              | hidden but by a hook at ``embed.hook_patch_mask``                 |
| ``PatchTSTModel``            | [batch, channel, pos, d_model]                                    |

``past_observed_mask`` is ``mask`` [batch, time], or NaN in the series for one channel's samples.

Refused: ``share_projection=False`` (the source crashes, for one channel too), a distribution over
one step (so does it), no pooling for a classifier or a regression (so do they), scalers over
another axis, other activations than ReLU, GELU and SiLU, replaced modules, subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import einops
import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial, series_trials
from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.patchtst_source import (
    check_structure,
    inner,
    load,
    reads,
    rebuild,
    recognises,
    run,
    run_source,
    taps,
)
from tstlens.conversion.registry import Built, Family, register
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def build(
    source: nn.Module | Mapping[str, Tensor],
    config: Any = None,
    architecture: str | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert a Hugging Face PatchTST.

    Args:
        source: one of the five classes, or a state dict.
        config: the ``PatchTSTConfig`` or its dictionary (state dict only, needed there).
        architecture: the class (state dict only, where neither config nor weights tell it).
        class_names: one name per logit.
    """
    if isinstance(source, Mapping):
        source = rebuild(source, config, architecture)
        made_of = "transformers.{} rebuilt from a state dict"
    else:
        if config is not None or architecture is not None:
            raise ArgumentError("a live PatchTST knows its config itself; leave config= out")
        made_of = "transformers.{}"
    name = type(source).__qualname__
    settings: Any = source.config
    _refuse(source, name)
    check_structure(source)
    embed = _embed(source)
    scalers = {"std": ("loc", "scale"), "mean": ("scale",), "none": ()}
    cfg = HookedTSTConfig(
        n_layers=settings.num_hidden_layers,
        d_model=settings.d_model,
        n_heads=settings.num_attention_heads,
        d_mlp=settings.ffn_dim,
        embed=embed,
        head=_head(source, name, scalers[embed.scaling]),
        n_channels=settings.num_input_channels,
        n_time=settings.context_length,
        positions="learned" if settings.positional_encoding_type == "random" else "sinusoidal",
        act_fn=_ACTIVATIONS[settings.activation_function],  # type: ignore[arg-type]
        norm_position="pre" if settings.pre_norm else "post",
        normalization_type="BN" if settings.norm_type == "batchnorm" else "LN",
        eps=settings.norm_eps,
        mlp_bias=bool(settings.bias),
        second_attention="channel" if settings.channel_attention else "none",
        class_names=class_names,
        model_name=name,
    )
    weight = next(source.parameters())
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, source)
    return Built(model, source, _trials(cfg), made_of.format(name))


def _refuse(source: Any, name: str) -> None:
    """Name the option that is not covered, or that the source itself cannot run."""
    settings = source.config
    if settings.activation_function not in _ACTIVATIONS:
        raise UnsupportedSourceError(
            f"activation_function={settings.activation_function!r} is not covered; "
            f"{', '.join(_ACTIVATIONS)} are"
        )
    scaler = inner(source).scaler.scaler
    if scaler.dim != 1 or not scaler.keepdim:
        raise UnsupportedSourceError(
            f"scaling_dim={scaler.dim}, keepdim={scaler.keepdim} is not covered: every channel "
            "is scaled over time here (scaling_dim=1, keepdim=True)"
        )
    forecasts = name == "PatchTSTForPrediction"
    if forecasts and not settings.share_projection:
        raise UnsupportedSourceError(
            "share_projection=False is not covered: transformers' own forward pass fails with it, "
            "because the loop over channels overwrites the embedding that it reads from"
        )
    if forecasts and source.distribution_output is not None and settings.prediction_length == 1:
        raise UnsupportedSourceError(
            f"loss={settings.loss!r} with prediction_length=1 is not covered: transformers' own "
            "forward pass fails with it, because the parameters lose their axis of steps"
        )
    pools = name in ("PatchTSTForClassification", "PatchTSTForRegression")
    if pools and _pooling(settings) == "flatten":
        raise UnsupportedSourceError(
            f"pooling_type={settings.pooling_type!r} without a CLS token is not covered for "
            f"{name}: transformers' own forward pass fails with it"
        )


def _pooling(settings: Any) -> str:
    if settings.use_cls_token:
        return "first"
    return settings.pooling_type if settings.pooling_type in ("mean", "max") else "flatten"


def _embed(source: Any) -> Any:
    from tstlens.model.families.patchtst import PatchTSTEmbedConfig

    settings, scaler = source.config, inner(source).scaler.scaler
    kinds = {"PatchTSTStdScaler": "std", "PatchTSTMeanScaler": "mean"}
    scaling: Any = kinds.get(type(scaler).__name__, "none")
    options: dict[str, Any] = (
        {} if scaling == "none" else {"smallest_scale": float(scaler.minimum_scale)}
    )
    if scaling == "mean" and scaler.default_scale is not None:
        options["default_scale"] = float(scaler.default_scale)
    return PatchTSTEmbedConfig(
        patch_len=settings.patch_length,
        stride=settings.patch_stride,
        scaling=scaling,
        shared=bool(settings.share_embedding),
        cls_token=bool(settings.use_cls_token),
        mask_value=float(settings.mask_value) if inner(source).do_mask_input else None,
        **options,
    )


def _head(source: Any, name: str, statistics: tuple[str, ...]) -> Any:
    from tstlens.model.families import patchtst_heads

    settings = source.config
    pooling: Any = _pooling(settings)
    distribution = getattr(source, "distribution_output", None)
    kind = None if distribution is None else settings.distribution_output
    if name == "PatchTSTForClassification":
        return HeadConfig(pooling, n_classes=settings.num_targets)
    if name == "PatchTSTForPretraining":
        return patchtst_heads.PatchTSTPatchesConfig(settings.patch_length, settings.use_cls_token)
    if name == "PatchTSTModel":
        return patchtst_heads.PatchTSTStreamConfig()
    if name == "PatchTSTForRegression":
        limits = None if settings.output_range is None else tuple(settings.output_range)
        return patchtst_heads.PatchTSTRegressionConfig(
            settings.num_targets, pooling, None if kind else limits, kind
        )
    return patchtst_heads.PatchTSTForecastConfig(
        settings.prediction_length, pooling, kind, statistics
    )


def _fill_model(model: Any, source: Any) -> None:
    encoder = inner(source).encoder
    embedder = encoder.embedder.input_embedding
    each = [embedder] if isinstance(embedder, nn.Linear) else list(embedder)
    W_E, b_E = (torch.stack([getattr(e, n) for e in each]) for n in ("weight", "bias"))
    shared = model.cfg.embed.shared
    weights = {"W_E": W_E.transpose(1, 2), "b_E": b_E}
    fill(model.embed, {name: w[0] if shared else w for name, w in weights.items()})
    place = encoder.positional_encoder
    if model.cfg.embed.cls_token:
        fill(model.embed, {"cls_token": place.cls_token.flatten()})
    fill(model.pos_embed, {"W_pos": place.position_enc})
    for block, layer in zip(model.blocks, encoder.layers, strict=True):
        _fill_block(block, layer, model.cfg.n_heads)
    head = getattr(source, "head", None)
    if head is None:
        return
    last = getattr(head, "linear", None) or head.projection
    linears = [last] if isinstance(last, nn.Linear) else list(last.proj)
    W_U, b_U = (torch.cat([getattr(part, n) for part in linears]) for n in ("weight", "bias"))
    fill(model.head, {"W_U": W_U.T, "b_U": b_U})


def _fill_block(block: Any, layer: Any, n_heads: int) -> None:
    attention = {}
    for ours, theirs in (("Q", "q_proj"), ("K", "k_proj"), ("V", "v_proj")):
        linear = getattr(layer.self_attn, theirs)
        attention[f"W_{ours}"] = einops.rearrange(
            linear.weight, "(head d_head) d_model -> head d_model d_head", head=n_heads
        )
        attention[f"b_{ours}"] = einops.rearrange(
            linear.bias, "(head d_head) -> head d_head", head=n_heads
        )
    out = layer.self_attn.out_proj
    attention["W_O"] = einops.rearrange(
        out.weight, "d_model (head d_head) -> head d_head d_model", head=n_heads
    )
    attention["b_O"] = out.bias
    fill(block.attn, attention)
    _fill_norm(block.ln1, layer.norm_sublayer1)
    if layer.channel_attention:
        fill(block.channel_attn, attention)
        _fill_norm(block.ln2, layer.norm_sublayer2)
    _fill_norm(block.mlp_norm, layer.norm_sublayer3)
    for number, name in ((0, "in"), (3, "out")):
        linear = layer.ff[number]
        fill(block.mlp, {f"W_{name}": linear.weight.T})
        if linear.bias is not None:
            fill(block.mlp, {f"b_{name}": linear.bias})


def _fill_norm(ours: nn.Module, norm: Any) -> None:
    theirs: Any = getattr(norm, "batchnorm", norm)
    fill(ours, {"w": theirs.weight, "b": theirs.bias})
    if hasattr(theirs, "running_mean"):
        fill(ours, {"running_mean": theirs.running_mean, "running_var": theirs.running_var})


def _trials(cfg: Any) -> tuple[Trial, ...]:
    """Random, large, constant, padded and gappy series; for pretraining hidden patches too."""
    inputs = list(series_trials(cfg.n_channels, cfg.n_time, masked=True))
    generator = torch.Generator().manual_seed(1)
    normal = inputs[0][1][0]
    gaps = torch.rand(normal.shape, generator=generator) < 0.3
    gaps[..., -1] = False  # every channel keeps a sample
    holes = normal.masked_fill(gaps, float("nan"))
    inputs.append((f"30 % missing {list(normal.shape)}", (holes,)))
    trials = [Trial(name, tensors, _run_model, run_source) for name, tensors in inputs]
    if cfg.embed.mask_value is not None:
        shape = (*normal.shape[:2], cfg.embed.n_patches(cfg.n_time))
        hidden = (torch.rand(shape, generator=generator) < 0.4).double()
        trials.append(
            Trial(
                f"40 % of patches hidden {list(shape)}",
                (normal, hidden),
                _run_hidden,
                _source_hidden,
            )
        )
    return tuple(trials)


def _run_model(model: HookedTST, series: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(series, mask=mask)


def _run_hidden(model: HookedTST, series: Tensor, hidden: Tensor) -> Tensor:
    hooks = [("embed.hook_patch_mask", lambda mask, hook: hidden)]
    return model.run_with_hooks(series, fwd_hooks=hooks)


def _source_hidden(source: Any, series: Tensor, hidden: Tensor) -> Tensor:
    return run_source(source, series, None, hidden)


register(
    Family(
        name="patchtst",
        summary="Hugging Face PatchTST (PatchTSTModel, ForClassification, ForPrediction, "
        "ForRegression, ForPretraining), live, as a folder, or as a state dict (then give config=)",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
