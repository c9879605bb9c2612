"""ConvTST: a trainable time-series classifier in plain PyTorch.

A convolution stem turns a series into positions, a learned position embedding is added, a
``torch.nn.TransformerEncoder`` runs over the positions, and a linear layer reads the pooled
positions. With the default sizes this is, key for key, the classifier of Kalnāre (2025).

This is a *source* model: it has no hooks. Train it here, then open it up with
``tstlens.convert``. To study a model that you already have, you do not need this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tstlens.arguments import Count, check_fields, checked
from tstlens.data import check_series
from tstlens.errors import ArgumentError, SeriesValueError, UnknownNameError
from tstlens.shapes import Mask, Series

POOLINGS = ("max", "mean", "last")
ACTIVATIONS = ("relu", "gelu")


@dataclasses.dataclass(frozen=True)
class ConvTSTConfig:
    """The sizes of a ConvTST.

    Args:
        n_channels: channels of a series.
        n_time: samples of a series; the model takes exactly this length.
        n_classes: logits.
        conv_channels: channels after each stage of the stem; the last one is ``d_model``.
        kernel_sizes: odd kernel of each stage, in samples of its input; padded by half.
        strides: stride of each stage; their product is the samples per position.
        n_heads: attention heads; must divide ``d_model``.
        d_mlp: width of the MLP's hidden layer.
        n_layers: encoder layers.
        dropout: probability, inside the encoder layers, while training.
        pooling: how positions become one vector: "max", "mean" or "last".
        activation: of the MLP, "relu" or "gelu" (exact); the stem always uses ReLU.
        norm_first: pre-norm layers and a final LayerNorm; False is PyTorch's default, post-norm
            without a final norm.

    Raises:
        ArgumentError: sizes that do not fit together.
        UnknownNameError: a pooling or activation that does not exist.

    Source: arXiv 2511.21514 (the default sizes).

    Example:
        >>> ConvTSTConfig(n_channels=1, n_time=150, n_classes=2, strides=(1, 2, 2)).n_pos
        38
    """

    n_channels: int
    n_time: Count
    n_classes: int
    conv_channels: tuple[int, ...] = (32, 64, 128)
    kernel_sizes: tuple[int, ...] = (5, 3, 3)
    strides: tuple[int, ...] = (1, 1, 1)
    n_heads: int = 8
    d_mlp: int = 256
    n_layers: int = 3
    dropout: float = 0.1
    pooling: str = "max"
    activation: str = "relu"
    norm_first: bool = False

    def __post_init__(self) -> None:
        for name in ("conv_channels", "kernel_sizes", "strides"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        n_stages = len(self.conv_channels)
        if not n_stages == len(self.kernel_sizes) == len(self.strides) or n_stages == 0:
            raise ArgumentError(
                "conv_channels, kernel_sizes and strides describe the same stages and must have "
                f"the same length of at least 1; got {n_stages}, {len(self.kernel_sizes)} and "
                f"{len(self.strides)}"
            )
        sizes = ("n_channels", "n_time", "n_classes", "n_heads", "d_mlp", "n_layers")
        named = [(name, getattr(self, name)) for name in sizes]
        named += [("conv_channels", size) for size in self.conv_channels]
        named += [("strides", size) for size in self.strides]
        for name, size in named:
            if size < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {size}")
        for size in self.kernel_sizes:
            if size < 1 or size % 2 == 0:
                raise ArgumentError(
                    f"kernel_sizes: expected odd sizes, got {size}; an even kernel has no centre, "
                    "so no sample that a position stands for"
                )
        if self.d_model % self.n_heads:
            raise ArgumentError(
                f"n_heads: {self.n_heads} does not divide d_model={self.d_model} "
                "(the last of conv_channels)"
            )
        if not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        if self.pooling not in POOLINGS:
            raise UnknownNameError(self.pooling, POOLINGS, "this names the pooling")
        if self.activation not in ACTIVATIONS:
            raise UnknownNameError(self.activation, ACTIVATIONS, "this names the activation")

    @property
    def d_model(self) -> int:
        """Width of the residual stream: the last of ``conv_channels``."""
        return self.conv_channels[-1]

    @property
    def n_pos(self) -> int:
        """Positions that the stem makes of ``n_time`` samples."""
        n_pos = self.n_time
        for stride in self.strides:
            n_pos = -(-n_pos // stride)
        return n_pos

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvTSTConfig:
        """The inverse of ``to_dict``; raises UnknownNameError for a field that does not exist."""
        refuse_unfit(cls, values)
        sizes: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**sizes)


def refuse_unfit(record: type, values: Any) -> None:
    """Raise unless these are fields of the dataclass by name, with all that it needs.

    Raises:
        ArgumentError: no dict, or a field that is needed is missing.
        UnknownNameError: a field that does not exist.
    """
    if not isinstance(values, Mapping):
        got = type(values).__name__
        raise ArgumentError(f"expected the fields of {record.__name__} as a dict, got {got}")
    fields = {field.name: field for field in dataclasses.fields(record)}
    for name in values:
        if name not in fields:
            raise UnknownNameError(name, fields, f"these are the fields of {record.__name__}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ArgumentError(f"{record.__name__} needs {', '.join(missing)} too")


class ConvTST(nn.Module):
    """A convolution stem, a transformer encoder, a pooled linear classifier.

    Modules: ``conv1``, ``bn1``, ``conv2`` … (one pair per stage), the parameter ``pos_enc``
    [1, pos, d_model], ``transformer_encoder`` (with ``norm`` only if ``norm_first``) and
    ``classifier``. ``config`` holds the sizes.

    Args:
        config: a ConvTSTConfig; or leave it out and give its fields as keywords.

    Source: arXiv 2511.21514; repository TSTpatching.

    Example:
        >>> model = ConvTST(n_channels=12, n_time=25, n_classes=10)
        >>> model(torch.randn(4, 12, 25)).shape
        torch.Size([4, 10])
    """

    @checked
    def __init__(self, config: ConvTSTConfig | None = None, **sizes: Any) -> None:
        super().__init__()
        if config is None:
            config = ConvTSTConfig.from_dict(sizes)
        elif sizes:
            config = ConvTSTConfig.from_dict({**config.to_dict(), **sizes})
        self.config = config
        n_in = config.n_channels
        stages = zip(config.conv_channels, config.kernel_sizes, config.strides, strict=True)
        for number, (n_out, kernel, stride) in enumerate(stages, start=1):
            conv = nn.Conv1d(n_in, n_out, kernel, stride=stride, padding=kernel // 2)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm1d(n_out))
            n_in = n_out
        self.pos_enc = nn.Parameter(0.02 * torch.randn(1, config.n_pos, config.d_model))
        layer = nn.TransformerEncoderLayer(
            config.d_model,
            config.n_heads,
            config.d_mlp,
            config.dropout,
            config.activation,
            batch_first=True,
            norm_first=config.norm_first,
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer,
            config.n_layers,
            norm=nn.LayerNorm(config.d_model) if config.norm_first else None,
            enable_nested_tensor=False,  # nested tensors drop padded positions, changing shapes
        )
        self.classifier = nn.Linear(config.d_model, config.n_classes)

    def forward(self, series: Series, mask: Mask | None = None) -> Float[Tensor, "batch class"]:
        """Class logits of a batch of series.

        Padded samples act exactly as the stem's own zero padding does, and their positions are
        neither attended to nor pooled, so what they hold cannot change the logits. A position
        counts as observed if the sample at its centre is. (While training, the statistics of
        batch norm run over padded positions too; in eval mode nothing does.)

        Args:
            series: [batch, channel, time], in the units the model was trained on.
            mask: [batch, time], True where a sample was observed; None if all were.

        Returns:
            Logits [batch, class].

        Raises:
            SeriesShapeError: axes that do not fit the config, or a mask of another shape.
            SeriesValueError: a series of another dtype than the weights.
            ArgumentError: a mask under which a series keeps no position.
        """
        check_series(series, self.config.n_channels, self.config.n_time, mask=mask, finite=False)
        dtype = next(self.parameters()).dtype
        if series.dtype != dtype and not torch.is_autocast_enabled(series.device.type):
            raise SeriesValueError(
                f"expected {dtype} series like the model's weights, got {series.dtype}; "
                f"cast one of them: series.to({dtype}) or model.to({series.dtype})"
            )
        hidden = series if mask is None else series.masked_fill(~mask[:, None], 0.0)
        for number, stride in enumerate(self.config.strides, start=1):
            hidden = self.get_submodule(f"conv{number}")(hidden)
            hidden = torch.relu(self.get_submodule(f"bn{number}")(hidden))
            if mask is not None:
                mask = mask[:, ::stride]
                hidden = hidden.masked_fill(~mask[:, None], 0.0)
        if mask is not None and not bool(mask.any(dim=1).all()):
            raise ArgumentError(
                "mask: a series keeps no observed position; each needs an observed sample at a "
                "multiple of the stem's total stride (padding belongs at the end)"
            )
        resid = hidden.transpose(1, 2) + self.pos_enc  # [batch, pos, d_model]
        padded = None if mask is None else ~mask
        resid = self.transformer_encoder(resid, src_key_padding_mask=padded)
        return self.classifier(self._pool(resid, mask))

    def _pool(
        self, resid: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch d_model"]:
        if self.config.pooling == "max":
            if mask is not None:
                resid = resid.masked_fill(~mask[..., None], -torch.inf)
            return resid.amax(dim=1)
        if self.config.pooling == "mean":
            if mask is None:
                return resid.mean(dim=1)
            kept = resid.masked_fill(~mask[..., None], 0.0)
            return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        if mask is None:
            return resid[:, -1]
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(dim=1)
        return resid[torch.arange(len(resid), device=resid.device), last]
