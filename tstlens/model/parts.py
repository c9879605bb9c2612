"""Configurations of the parts of a :class:`HookedTST`: its front end and its head.

Each front end's config also knows where its positions lie in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from tstlens import family_index
from tstlens.arguments import check_fields
from tstlens.errors import ArgumentError

Pooling = Literal["max", "mean", "first", "last", "flatten"]
ActFn = Literal["relu", "gelu", "gelu_tanh", "silu"]


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise :class:`ArgumentError` unless the value is one of these."""
    if value not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def positive(owner: str, **values: int) -> None:
    """Raise :class:`ArgumentError` unless every value is a positive integer."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{owner}.{name} must be a positive integer, got {value!r}")


def check_padding(value: int) -> None:
    """Raise :class:`ArgumentError` unless the value is a number of samples."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArgumentError(f"padding must be 0 or more samples, got {value!r}")


@dataclass(frozen=True)
class ConvStemConfig:
    """Convolutions over time, one stage after the other; every output step is a position.

    Args:
        channels: output channels of each stage; the last one is d_model.
        kernel_sizes: samples each stage looks at.
        strides: samples between two outputs of a stage.
        paddings: zeros added on both sides before a stage.
        batch_norm: ``"live"`` keeps a batch norm after each convolution, ``"folded"`` has it
            multiplied into the convolution (the same function in eval mode), ``"none"`` has none.
        activation: after each stage.
    """

    channels: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    batch_norm: Literal["live", "folded", "none"] = "live"
    activation: ActFn = "relu"
    kind: str = "conv-stem"

    def __post_init__(self) -> None:
        for name in ("channels", "kernel_sizes", "strides", "paddings"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        for name in ("channels", "kernel_sizes", "strides", "paddings"):
            if len(getattr(self, name)) != len(self.channels) or not self.channels:
                raise ArgumentError(
                    f"a conv stem needs one entry per stage in {name}: expected "
                    f"{len(self.channels)}, got {len(getattr(self, name))}"
                )
        for values in zip(self.channels, self.kernel_sizes, self.strides, strict=True):
            positive("ConvStemConfig", channels=values[0], kernel_size=values[1], stride=values[2])
        for padding in self.paddings:
            check_padding(padding)
        one_of("ConvStemConfig.batch_norm", self.batch_norm, ("live", "folded", "none"))
        one_of("ConvStemConfig.activation", self.activation, ("relu", "gelu", "gelu_tanh", "silu"))

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        for kernel, stride, padding in zip(
            self.kernel_sizes, self.strides, self.paddings, strict=True
        ):
            n_time = (n_time + 2 * padding - kernel) // stride + 1
        return n_time

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was computed from (its receptive field)."""
        stages = list(zip(self.kernel_sizes, self.strides, self.paddings, strict=True))
        lengths = [n_time]  # samples that go into each stage; beyond them lies padding
        for kernel, stride, padding in stages[:-1]:
            lengths.append((lengths[-1] + 2 * padding - kernel) // stride + 1)
        start, stop = pos, pos + 1
        for (kernel, stride, padding), length in reversed(list(zip(stages, lengths, strict=True))):
            start = min(max(start * stride - padding, 0), length)
            stop = min(max((stop - 1) * stride - padding + kernel, start), length)
        return slice(start, stop)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """Samples that lie nearest to position ``pos``; the cells of all positions tile time."""
        step = 1
        for stride in self.strides:
            step *= stride
        last = pos == self.n_pos(n_time) - 1
        return slice(min(pos * step, n_time), n_time if last else min((pos + 1) * step, n_time))


@dataclass(frozen=True)
class LinearPatchesConfig:
    """A linear map of every patch of ``patch_len`` samples, ``stride`` samples apart.

    Args:
        patch_len: samples in one patch.
        stride: samples between the starts of two patches.
        padding: samples added at the end by repeating the last one (PatchTST uses ``stride``).
        leftover: what happens to samples that fill no patch: ``"error"``, ``"drop_start"`` (as
            Hugging Face PatchTST does) or ``"drop_end"``.
        channel_independent: each channel goes through the trunk by itself with the same weights
            (rows of the trunk are batch x channel); otherwise a patch spans all channels.
        bias: whether the linear map has a bias.
    """

    patch_len: int
    stride: int
    padding: int = 0
    leftover: Literal["error", "drop_start", "drop_end"] = "error"
    channel_independent: bool = False
    bias: bool = True
    kind: str = "linear-patches"

    def __post_init__(self) -> None:
        positive("LinearPatchesConfig", patch_len=self.patch_len, stride=self.stride)
        check_padding(self.padding)
        one_of("leftover", self.leftover, ("error", "drop_start", "drop_end"))
        check_fields(self)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return (n_time + self.padding - self.patch_len) // self.stride + 1

    def offset(self, n_time: int) -> int:
        """First sample that is used (leftover samples may be dropped at the start)."""
        used = (self.n_pos(n_time) - 1) * self.stride + self.patch_len
        left = n_time + self.padding - used
        if left and self.leftover == "error":
            raise ArgumentError(
                f"{n_time} samples (+{self.padding} padding) do not divide into patches of "
                f"{self.patch_len} every {self.stride}: {left} left over; cut the series, or set "
                "leftover to 'drop_start' or 'drop_end'"
            )
        return left if self.leftover == "drop_start" else 0

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from."""
        start = self.offset(n_time) + pos * self.stride
        return slice(min(start, n_time), min(start + self.patch_len, n_time))

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`: a patch is its own cell."""
        return self.time_span(pos, n_time)


@dataclass(frozen=True)
class PerStepConfig:
    """A linear map of all channels at every time step; every step is a position."""

    bias: bool = True
    kind: str = "per-step"

    def __post_init__(self) -> None:
        check_fields(self)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return n_time

    def time_span(self, pos: int, n_time: int) -> slice:
        """The one sample that position ``pos`` was embedded from."""
        return slice(pos, pos + 1)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`."""
        return self.time_span(pos, n_time)


@dataclass(frozen=True)
class CustomConfig:
    """A module that the user brought: front end or head; its code is not saved, its weights are.

    Args:
        module_class: dotted name of the module's class, for the error that asks for it again.
    """

    module_class: str
    kind: str = "custom"


@dataclass(frozen=True)
class HeadConfig:
    """Pool over positions, then one linear map.

    Args:
        pooling: ``"max"``, ``"mean"``, ``"first"`` (a CLS token at the front), ``"last"`` (the last
            observed position) or ``"flatten"`` (all positions side by side, position-major).
        n_classes: logits of a classifier, or None for a forecaster.
        horizon: steps of a forecast in every channel, or None for a classifier.
        bias: whether the linear map has a bias.
    """

    pooling: Pooling = "mean"
    n_classes: int | None = None
    horizon: int | None = None
    bias: bool = True
    kind: str = "linear"

    def __post_init__(self) -> None:
        one_of("HeadConfig.pooling", self.pooling, ("max", "mean", "first", "last", "flatten"))
        if (self.n_classes is None) == (self.horizon is None):
            raise ArgumentError(
                "a head gives either classes or a horizon: set exactly one of n_classes and "
                f"horizon, got n_classes={self.n_classes}, horizon={self.horizon}"
            )
        if self.n_classes is not None:
            positive("HeadConfig", n_classes=self.n_classes)
        if self.horizon is not None:
            positive("HeadConfig", horizon=self.horizon)
        check_fields(self)


@runtime_checkable
class FamilyPart(Protocol):
    """Front end or head of a source family: a config that builds its own module.

    ``kind`` names it in a saved model (see ``family_index.py``). A front end's config also has
    ``n_pos(n_time)``, ``time_span(pos, n_time)``, ``time_cell(pos, n_time)`` (empty slices for
    special tokens) and ``channel_independent``; ``takes_missing`` where NaN stands for a missing
    value, ``check(n_time)`` where not every length is possible, and ``join(series, covariates)``
    where further inputs come as channels (see ``covariates.py``). A head's config has
    ``n_classes`` and ``horizon``, one of them None, and ``pooling``; a forecaster's whose output is
    more than a value per step has ``reading``, and one that is drawn step by step has ``sample``.
    """

    @property
    def kind(self) -> str:
        """Its name in a saved model."""
        ...

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        ...


EmbedConfig = ConvStemConfig | LinearPatchesConfig | PerStepConfig | CustomConfig | FamilyPart
EMBEDS: dict[str, Any] = {
    "conv-stem": ConvStemConfig,
    "linear-patches": LinearPatchesConfig,
    "per-step": PerStepConfig,
    "custom": CustomConfig,
}
HEADS: dict[str, Any] = {"linear": HeadConfig, "custom": CustomConfig}


def part_class(kind: Any, known: dict[str, Any]) -> Any:
    """The config class of a kind of front end or head; None where it is not known."""
    return known[kind] if kind in known else family_index.part_class(kind)
