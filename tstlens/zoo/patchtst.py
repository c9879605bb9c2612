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

PatchTST's front end (Hugging Face's form): scale every channel, cut it, embed every patch.

Source: Nie et al. 2023, "A time series is worth 64 words", arXiv 2211.14730, as in
``transformers.models.patchtst``.

PatchTST's heads (Hugging Face's form): forecasts, regression, patches, the stream itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig
from tstlens.model.heads import pool
from tstlens.model.norms import watched
from tstlens.model.parts import one_of, positive
from tstlens.model.reading import Reading
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.layers import fill
from tstlens.zoo.parity import Trial, run_model, series_trials
from tstlens.zoo.parts import (
    PARAMETERS,
    Distribution,
    OwnCells,
    check_observed,
    domain,
    fill_missing,
    mean_and_std,
    mean_size,
    read_parameters,
    rescale,
)
from tstlens.zoo.patchtst_source import (
    CLASSES,
    MODULE,
    check_structure,
    inner,
    layer_table,
    load,
    reads,
    rebuild,
    run,
    run_source,
    taps,
)
from tstlens.zoo.registry import Built, register_classes
from tstlens.zoo.t5 import ACTIVATIONS


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
        act_fn=ACTIVATIONS[settings.activation_function],  # type: ignore[arg-type]
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
    if settings.activation_function not in ACTIVATIONS:
        raise UnsupportedSourceError(
            f"activation_function={settings.activation_function!r} is not covered; "
            f"{', '.join(ACTIVATIONS)} are"
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

    settings = source.config
    pooling: Any = _pooling(settings)
    distribution = getattr(source, "distribution_output", None)
    kind = None if distribution is None else settings.distribution_output
    if name == "PatchTSTForClassification":
        return HeadConfig(pooling, n_classes=settings.num_targets)
    if name == "PatchTSTForPretraining":
        return PatchTSTPatchesConfig(settings.patch_length, settings.use_cls_token)
    if name == "PatchTSTModel":
        return PatchTSTStreamConfig()
    if name == "PatchTSTForRegression":
        limits = None if settings.output_range is None else tuple(settings.output_range)
        return PatchTSTRegressionConfig(
            settings.num_targets, pooling, None if kind else limits, kind
        )
    return PatchTSTForecastConfig(settings.prediction_length, pooling, kind, statistics)


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
        layer_table(source).fill(block, layer.state_dict())
    head = getattr(source, "head", None)
    if head is None:
        return
    last = getattr(head, "linear", None) or head.projection
    linears = [last] if isinstance(last, nn.Linear) else list(last.proj)
    W_U, b_U = (torch.cat([getattr(part, n) for part in linears]) for n in ("weight", "bias"))
    fill(model.head, {"W_U": W_U.T, "b_U": b_U})


def _trials(cfg: Any) -> tuple[Trial, ...]:
    """Random, large, constant, padded and gappy series; for pretraining hidden patches too."""
    inputs = list(series_trials(cfg.n_channels, cfg.n_time, masked=True))
    generator = torch.Generator().manual_seed(1)
    normal = inputs[0][1][0]
    gaps = torch.rand(normal.shape, generator=generator) < 0.3
    gaps[..., -1] = False  # every channel keeps a sample
    holes = normal.masked_fill(gaps, float("nan"))
    inputs.append((f"30 % missing {list(normal.shape)}", (holes,)))
    trials = [Trial(name, tensors, run_model, run_source) for name, tensors in inputs]
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


def _run_hidden(model: HookedTST, series: Tensor, hidden: Tensor) -> Tensor:
    hooks = [("embed.hook_patch_mask", lambda mask, hook: hidden)]
    return model.run_with_hooks(series, fwd_hooks=hooks)


def _source_hidden(source: Any, series: Tensor, hidden: Tensor) -> Tensor:
    return run_source(source, series, None, hidden)


FAMILY = register_classes(
    "patchtst", [f"{MODULE}.{name}" for name in CLASSES], build, run, taps, reads=reads, load=load
)


Scaling = Literal["std", "mean", "none"]
_Patches = Float[Tensor, "batch channel patch patch_len"]


@dataclass(frozen=True)
class PatchTSTEmbedConfig(OwnCells):
    """Scale, cut into patches, embed; every channel goes through the trunk by itself.

    Missing samples (NaN, or False in the mask) are zeros before scaling and take no part in mean
    and scale, as in the source; their positions are attended to like all others. Samples that
    fill no patch are dropped at the start.

    Args:
        patch_len: samples in one patch.
        stride: samples between the starts of two patches.
        scaling: ``"std"`` takes out mean and standard deviation, ``"mean"`` the mean absolute
            value, ``"none"`` nothing.
        smallest_scale: added to the variance (``"std"``), or least scale (``"mean"``).
        default_scale: of a channel without observed samples (``"mean"``); None for none.
        shared: one embedding for all channels, or one for each.
        cls_token: whether a token of its own stands before the patches.
        mask_value: what a patch hidden at ``hook_patch_mask`` holds; None where the source hides
            no patches.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    patch_len: int
    stride: int
    scaling: Scaling = "std"
    smallest_scale: float = 1e-5
    default_scale: float | None = None
    shared: bool = True
    cls_token: bool = False
    mask_value: float | None = None
    kind: str = "patchtst"

    def __post_init__(self) -> None:
        positive("PatchTSTEmbedConfig", patch_len=self.patch_len, stride=self.stride)
        one_of("PatchTSTEmbedConfig.scaling", self.scaling, ("std", "mean", "none"))
        if not self.smallest_scale > 0:
            raise ArgumentError(f"smallest_scale must be above 0, got {self.smallest_scale}")

    @property
    def channel_independent(self) -> bool:
        """Rows of the trunk are batch x channel."""
        return True

    @property
    def takes_missing(self) -> bool:
        """NaN marks a missing sample."""
        return True

    def n_patches(self, n_time: int) -> int:
        """Patches of a series of ``n_time`` samples."""
        return (n_time - self.patch_len) // self.stride + 1

    def n_pos(self, n_time: int) -> int:
        """Positions: patches, and the CLS token where there is one."""
        n_patches = self.n_patches(n_time)
        return n_patches + self.cls_token if n_patches > 0 else 0

    def start(self, n_time: int) -> int:
        """First sample of the first patch."""
        return n_time - self.patch_len - (self.n_patches(n_time) - 1) * self.stride

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from; none for the CLS token."""
        if self.cls_token and pos == 0:
            return slice(0, 0)
        start = self.start(n_time) + (pos - self.cls_token) * self.stride
        return slice(start, start + self.patch_len)

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTEmbed(self, cfg.n_channels, cfg.d_model)


class PatchTSTEmbed(nn.Module):
    """From a series to patches' embeddings; mean and scale go to the head.

    ``W_E`` is [patch_len, d_model], or [channel, patch_len, d_model] where every channel has its
    own. Hook points: ``hook_loc`` and ``hook_scale`` [batch, channel, 1] (edits also reach the
    head), ``hook_scaled`` [batch, channel, time], ``hook_patches`` [batch, channel, patch,
    patch_len], and ``hook_patch_mask`` [batch, channel, patch]: zeros, and a hook that returns
    ones for some patches hides them, as pretraining does.
    """

    def __init__(self, cfg: PatchTSTEmbedConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        each = () if cfg.shared else (n_channels,)
        self.W_E = nn.Parameter(torch.zeros(*each, cfg.patch_len, d_model))
        self.b_E = nn.Parameter(torch.zeros(*each, d_model))
        if cfg.cls_token:
            self.cls_token = nn.Parameter(torch.zeros(d_model))
        if cfg.scaling == "std":
            self.hook_loc = Hook("batch channel 1")
        if cfg.scaling != "none":
            self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")
        self.hook_patches = Hook("batch channel pos patch_len")
        if cfg.mask_value is not None:
            self.hook_patch_mask = Hook("batch channel pos")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        scaled, statistics = self.scale(series, mask)
        if watched(self.hook_scaled):
            scaled = self.hook_scaled(scaled.clone())  # unscaled, it is the series itself
        patches = self.hide(self.cut(scaled))  # [batch, channel, patch, patch_len]
        if self.cfg.shared:
            rows = patches.flatten(0, 1)  # [batch * channel, patch, patch_len]
            flat = torch.addmm(self.b_E, rows.flatten(0, 1), self.W_E)
            x = flat.view(len(rows), rows.shape[1], flat.shape[1])
        else:
            x = torch.einsum("bcpl,cld->bcpd", patches, self.W_E) + self.b_E[:, None]
            x = x.flatten(0, 1)
        if self.cfg.cls_token:
            x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1)
        per_row = {name: value.flatten(0, 1) for name, value in statistics.items()}  # [row, 1]
        return x, TrunkState(n_series_channels=series.shape[1], statistics=per_row)

    def scale(self, series: Series, mask: Mask | None) -> tuple[Series, dict[str, Tensor]]:
        """The scaled series, and what was taken out of it."""
        series, observed = fill_missing(series, mask)
        if self.cfg.scaling == "none":
            return series, {}
        if self.cfg.scaling == "mean":
            if self.cfg.default_scale is None:
                check_observed(observed)
            scale = self.hook_scale(
                mean_size(series, observed, self.cfg.smallest_scale, self.cfg.default_scale)
            )
            return series / scale, {"scale": scale}
        loc, scale = mean_and_std(series, observed, self.cfg.smallest_scale)
        loc, scale = self.hook_loc(loc), self.hook_scale(scale)
        return (series - loc) / scale, {"loc": loc, "scale": scale}

    def cut(self, scaled: Series) -> _Patches:
        """Patches, overlapping where the stride is shorter than they are."""
        start = self.cfg.start(scaled.shape[2])
        patches = scaled[:, :, start:].unfold(2, self.cfg.patch_len, self.cfg.stride)
        if watched(self.hook_patches):
            patches = self.hook_patches(patches.clone())  # they may overlap, and are views
        return patches

    def hide(self, patches: _Patches) -> _Patches:
        """Patches with the mask's value where a hook hides them."""
        if self.cfg.mask_value is None or not watched(self.hook_patch_mask):
            return patches
        hidden = self.hook_patch_mask(torch.zeros_like(patches[..., 0]))[..., None]
        return patches * (1 - hidden) + self.cfg.mask_value * hidden


Pooling = Literal["max", "mean", "first", "flatten"]
_POOLINGS = ("max", "mean", "first", "flatten")


@dataclass(frozen=True)
class PatchTSTForecastConfig:
    """Pool every channel's positions, one linear map, then scale and mean put back.

    Args:
        horizon: steps of a forecast.
        pooling: over positions; ``"first"`` is the CLS token.
        distribution: None for a forecast [batch, channel, horizon]; else its parameters,
            [batch, channel, horizon, parameter] in the order of ``parameters``, in the series'
            units (``patching.quantile_loss`` takes them).
        statistics: what the front end takes out: ``"loc"``, ``"scale"``, both or none.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    horizon: int
    pooling: Pooling = "flatten"
    distribution: Distribution | None = None
    statistics: tuple[str, ...] = ("loc", "scale")
    kind: str = "patchtst-forecast"

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", tuple(self.statistics))
        positive("PatchTSTForecastConfig", horizon=self.horizon)
        one_of("PatchTSTForecastConfig.pooling", self.pooling, _POOLINGS)
        if self.distribution is not None:
            one_of("distribution", self.distribution, tuple(PARAMETERS))

    @property
    def n_classes(self) -> None:
        """None: this is no classifier."""
        return None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the distribution's parameters; empty without one."""
        return PARAMETERS[self.distribution] if self.distribution else ()

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return read_parameters(self.distribution)

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTForecast(self, cfg)


class PatchTSTForecast(nn.Module):
    """``pooled W_U + b_U`` in scaled units, then in the series' units.

    ``W_U`` is [d_pooled, horizon], or [d_pooled, parameter * horizon] of a distribution. What the
    head says in scaled units is at ``hook_scaled`` [batch, channel, horizon], or with a
    distribution at ``hook_parameters`` [batch, channel, horizon, parameter].
    """

    def __init__(self, head: PatchTSTForecastConfig, cfg: Any) -> None:
        super().__init__()
        self.cfg = head
        self.n_channels = cfg.n_channels
        d_in = cfg.d_model * (cfg.n_ctx if head.pooling == "flatten" else 1)
        self.n_parameters = len(head.parameters) or 1
        self.W_U = nn.Parameter(torch.zeros(d_in, self.n_parameters * head.horizon))
        self.b_U = nn.Parameter(torch.zeros(self.n_parameters * head.horizon))
        self.hook_pooled = Hook("row d_pooled")
        if head.distribution is None:
            self.hook_scaled = Hook("batch channel time")
        else:
            self.hook_parameters = Hook("batch channel time parameter")

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        pooled = self.hook_pooled(pool(residual, self.cfg.pooling, None))
        raw = torch.addmm(self.b_U, pooled, self.W_U)  # [row, parameter * horizon]
        raw = raw.unflatten(0, (-1, self.n_channels))
        given = {
            name: _statistic(state, name).unflatten(0, (-1, self.n_channels))  # [batch, channel, 1]
            for name in self.cfg.statistics
        }
        distribution = self.cfg.distribution
        if distribution is not None:
            raw = raw.unflatten(2, (self.n_parameters, -1)).transpose(2, 3)
            parameters = self.hook_parameters(domain(distribution, raw))
            return rescale(distribution, parameters, given.get("loc"), given.get("scale"))
        forecast = self.hook_scaled(raw)
        if "scale" in given:
            forecast = forecast * given["scale"]
        return forecast + given["loc"] if "loc" in given else forecast


@dataclass(frozen=True)
class PatchTSTRegressionConfig:
    """Pool every channel's positions, put the channels side by side, one linear map.

    Args:
        n_targets: numbers per series; the output is [batch, target].
        pooling: over positions; ``"first"`` is the CLS token.
        output_range: the least and the largest value of an output (a sigmoid between them), or
            None.
        distribution: None, or the distribution whose parameters are the output, [batch, target,
            parameter].

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    n_targets: int
    pooling: Pooling = "mean"
    output_range: tuple[float, float] | None = None
    distribution: Distribution | None = None
    kind: str = "patchtst-regression"

    def __post_init__(self) -> None:
        positive("PatchTSTRegressionConfig", n_targets=self.n_targets)
        one_of("PatchTSTRegressionConfig.pooling", self.pooling, _POOLINGS[:3])
        if self.distribution is not None:
            one_of("distribution", self.distribution, tuple(PARAMETERS))
        if self.output_range is not None:
            object.__setattr__(self, "output_range", tuple(self.output_range))
            if len(self.output_range) != 2:
                raise ArgumentError(f"output_range must be two numbers, got {self.output_range}")

    @property
    def n_classes(self) -> None:
        """None: this is no classifier."""
        return None

    @property
    def horizon(self) -> None:
        """None: this is no forecast."""
        return None

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTRegression(self, cfg)


class PatchTSTRegression(nn.Module):
    """``W_U`` is [channel * d_model, target], or [..., parameter * target] of a distribution."""

    def __init__(self, head: PatchTSTRegressionConfig, cfg: Any) -> None:
        super().__init__()
        self.cfg = head
        self.n_channels = cfg.n_channels
        self.n_parameters = len(PARAMETERS[head.distribution]) if head.distribution else 1
        d_out = self.n_parameters * head.n_targets
        self.W_U = nn.Parameter(torch.zeros(cfg.n_channels * cfg.d_model, d_out))
        self.b_U = nn.Parameter(torch.zeros(d_out))
        self.hook_pooled = Hook("row d_model")

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        pooled = self.hook_pooled(pool(residual, self.cfg.pooling, None))
        pooled = pooled.reshape(-1, self.n_channels * pooled.shape[1])
        out = torch.addmm(self.b_U, pooled, self.W_U)  # [batch, parameter * target]
        if self.cfg.distribution is not None:
            raw = out.unflatten(1, (self.n_parameters, -1)).transpose(1, 2)
            return domain(self.cfg.distribution, raw)
        if self.cfg.output_range is not None:
            low, high = self.cfg.output_range
            out = out.sigmoid() * (high - low) + low
        return out


@dataclass(frozen=True)
class PatchTSTPatchesConfig:
    """Every patch's samples from its position, [batch, channel, patch, patch_len], scaled.

    Args:
        patch_len: samples in one patch.
        cls_token: whether the first position is a token of its own, which is left out.
    """

    patch_len: int
    cls_token: bool = False
    kind: str = "patchtst-patches"

    n_classes = None
    horizon = None
    pooling = None

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTPatches(self, cfg)


class PatchTSTPatches(nn.Module):
    """The pretraining head: ``W_U`` is [d_model, patch_len].

    Its output is in units of the scaled series, as the source's loss compares it.
    """

    def __init__(self, head: PatchTSTPatchesConfig, cfg: Any) -> None:
        super().__init__()
        self.cfg = head
        self.n_channels = cfg.n_channels
        self.W_U = nn.Parameter(torch.zeros(cfg.d_model, head.patch_len))
        self.b_U = nn.Parameter(torch.zeros(head.patch_len))

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        patches = residual[:, int(self.cfg.cls_token) :]  # [row, patch, d_model]
        return (patches @ self.W_U + self.b_U).unflatten(0, (-1, self.n_channels))


@dataclass(frozen=True)
class PatchTSTStreamConfig:
    """No head: the output is what leaves the last block, [batch, channel, pos, d_model]."""

    kind: str = "patchtst-stream"

    n_classes = None
    horizon = None
    pooling = None

    def build(self, cfg: Any) -> nn.Module:
        """The module, which has no weights."""
        return PatchTSTStream(cfg.n_channels)


class PatchTSTStream(nn.Module):
    """Rows of the trunk as [batch, channel, ...]."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.n_channels = n_channels

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        return residual.unflatten(0, (-1, self.n_channels))


def _statistic(state: TrunkState, name: str) -> Tensor:
    if name not in state.statistics:
        raise ArgumentError(
            f"this head puts the series' {name} back, which the front end took out; pass the "
            "state= that embed_series returned with the residual stream"
        )
    return state.statistics[name]
