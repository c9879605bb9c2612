"""What a :class:`HookedTST` is made of: a validated configuration with a JSON round trip."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tstlens.errors import ArgumentError, UnknownNameError

Positions = Literal["learned", "sinusoidal", "none"]
Pooling = Literal["max", "mean", "first", "last", "flatten"]
NormPosition = Literal["pre", "post"]
NormType = Literal["LN", "RMS"]
ActFn = Literal["relu", "gelu", "gelu_tanh", "silu"]


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{owner}.{name} must be a positive integer, got {value!r}")


def _padding(value: int) -> None:
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
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != len(self.channels) or not self.channels:
                raise ArgumentError(
                    f"a conv stem needs one entry per stage in {name}: expected "
                    f"{len(self.channels)}, got {len(getattr(self, name))}"
                )
        for values in zip(self.channels, self.kernel_sizes, self.strides, strict=True):
            _positive("ConvStemConfig", channels=values[0], kernel_size=values[1], stride=values[2])
        for padding in self.paddings:
            _padding(padding)
        _one_of("ConvStemConfig.batch_norm", self.batch_norm, ("live", "folded", "none"))
        _one_of("ConvStemConfig.activation", self.activation, ("relu", "gelu", "gelu_tanh", "silu"))

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
        _positive("LinearPatchesConfig", patch_len=self.patch_len, stride=self.stride)
        _padding(self.padding)
        _one_of("leftover", self.leftover, ("error", "drop_start", "drop_end"))

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
        _one_of("HeadConfig.pooling", self.pooling, ("max", "mean", "first", "last", "flatten"))
        if (self.n_classes is None) == (self.horizon is None):
            raise ArgumentError(
                "a head gives either classes or a horizon: set exactly one of n_classes and "
                f"horizon, got n_classes={self.n_classes}, horizon={self.horizon}"
            )
        if self.n_classes is not None:
            _positive("HeadConfig", n_classes=self.n_classes)
        if self.horizon is not None:
            _positive("HeadConfig", horizon=self.horizon)


EmbedConfig = ConvStemConfig | LinearPatchesConfig | PerStepConfig | CustomConfig
_EMBEDS = {
    "conv-stem": ConvStemConfig,
    "linear-patches": LinearPatchesConfig,
    "per-step": PerStepConfig,
    "custom": CustomConfig,
}
_HEADS = {"linear": HeadConfig, "custom": CustomConfig}


@dataclass
class HookedTSTConfig:
    """Sizes and options of a :class:`HookedTST`, with TransformerLens' names where it has them.

    Args:
        n_layers: blocks of the trunk.
        d_model: width of the residual stream.
        n_heads: attention heads of each block.
        d_mlp: hidden units of each MLP.
        embed: the front end.
        head: what follows the trunk.
        d_head: width of a head; ``d_model // n_heads`` where None.
        n_channels: channels of a series; None where the front end is the user's own.
        n_time: samples of a series where the model takes one length only, else None.
        n_ctx: most positions the trunk takes (the length of learned positions).
        positions: what is added to the embedding.
        act_fn: the MLP's activation.
        norm_position: norm before each sublayer (``"pre"``) or after its sum (``"post"``).
        normalization_type: ``"LN"`` or ``"RMS"``.
        final_norm: whether a norm stands between the last block and the head.
        eps: added to the variance in each norm.
        attn_scale: scores are divided by it; ``sqrt(d_head)`` where None.
        causal: whether a position sees only itself and what is before it.
        attn_bias: whether q, k, v and the output projection have biases.
        mlp_bias: whether the MLP's two maps have biases.
        class_names: names of the classes, for figures.
        model_name: what the report calls the model.
        seed: of the weights of a new model.
        use_attn_result: fire ``attn.hook_result`` (one vector per head; costs memory).
        use_split_qkv_input: fire ``hook_q_input``, ``hook_k_input``, ``hook_v_input``.
        use_hook_mlp_in: fire ``hook_mlp_in``.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    embed: EmbedConfig
    head: HeadConfig | CustomConfig
    d_head: int | None = None
    n_channels: int | None = None
    n_time: int | None = None
    n_ctx: int | None = None
    positions: Positions = "none"
    act_fn: ActFn = "relu"
    norm_position: NormPosition = "pre"
    normalization_type: NormType = "LN"
    final_norm: bool = False
    eps: float = 1e-5
    attn_scale: float | None = None
    causal: bool = False
    attn_bias: bool = True
    mlp_bias: bool = True
    class_names: tuple[str, ...] | None = None
    model_name: str = "HookedTST"
    seed: int = 0
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    attn_only: bool = field(default=False, init=False)
    n_key_value_heads: None = field(default=None, init=False)
    device: str | torch.device = field(default="cpu", init=False)
    dtype: torch.dtype = field(default=torch.float32, init=False)

    def __post_init__(self) -> None:
        _positive(
            "HookedTSTConfig",
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_mlp=self.d_mlp,
        )
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ArgumentError(
                    f"d_model={self.d_model} does not divide into n_heads={self.n_heads} heads; "
                    "give d_head"
                )
            self.d_head = self.d_model // self.n_heads
        for name in ("d_head", "n_channels", "n_time", "n_ctx"):
            if getattr(self, name) is not None:
                _positive("HookedTSTConfig", **{name: getattr(self, name)})
        for name in ("eps", "attn_scale"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, float | int) and value > 0):
                raise ArgumentError(f"{name} must be a positive number, got {value!r}")
        _one_of("positions", self.positions, ("learned", "sinusoidal", "none"))
        _one_of("act_fn", self.act_fn, ("relu", "gelu", "gelu_tanh", "silu"))
        _one_of("norm_position", self.norm_position, ("pre", "post"))
        _one_of("normalization_type", self.normalization_type, ("LN", "RMS"))
        if self.class_names is not None:
            self.class_names = tuple(str(name) for name in self.class_names)
            n_classes = self.n_classes
            if n_classes is not None and len(self.class_names) != n_classes:
                raise ArgumentError(
                    f"expected {n_classes} class names, one per logit, got {len(self.class_names)}"
                )
        if not isinstance(self.embed, CustomConfig):
            self._check_front_end(self.embed)
        if self.n_ctx is None and self.positions == "learned":
            raise ArgumentError("learned positions need n_ctx, or n_time to read it off")
        if self.n_ctx is None and getattr(self.head, "pooling", None) == "flatten":
            raise ArgumentError("a flatten head needs n_ctx, or n_time to read it off")

    def _check_front_end(self, embed: ConvStemConfig | LinearPatchesConfig | PerStepConfig) -> None:
        """Channels, width and length fit; ``n_ctx`` is read off ``n_time`` where not given."""
        if self.n_channels is None:
            raise ArgumentError("n_channels is needed: the channels of a series")
        if isinstance(embed, ConvStemConfig) and embed.channels[-1] != self.d_model:
            raise ArgumentError(
                f"the conv stem ends in {embed.channels[-1]} channels, "
                f"the trunk has d_model={self.d_model}"
            )
        if self.n_time is not None:
            n_pos = embed.n_pos(self.n_time)
            if n_pos < 1:
                raise ArgumentError(f"a series of {self.n_time} samples gives no position at all")
            if isinstance(embed, LinearPatchesConfig):
                embed.offset(self.n_time)
            if self.n_ctx is None:
                self.n_ctx = n_pos
            if self.n_ctx < n_pos:
                raise ArgumentError(
                    f"a series of {self.n_time} samples makes {n_pos} positions, "
                    f"but n_ctx={self.n_ctx}"
                )

    @property
    def channel_independent(self) -> bool:
        """Whether every channel goes through the trunk by itself."""
        return bool(getattr(self.embed, "channel_independent", False))

    @property
    def n_classes(self) -> int | None:
        """Logits of a classifier; None for a forecaster or a head of the user's own."""
        return self.head.n_classes if isinstance(self.head, HeadConfig) else None

    @property
    def d_vocab_out(self) -> int | None:
        """TransformerLens' name for the number of logits."""
        return self.n_classes

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it; :meth:`from_dict` reads it back."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.init
        }
        values["embed"] = dataclasses.asdict(self.embed)
        values["head"] = dataclasses.asdict(self.head)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HookedTSTConfig:
        """Build a config from :meth:`to_dict`'s dictionary.

        Raises:
            ArgumentError: an entry is unknown or impossible.
        """
        values = dict(values)
        known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ArgumentError(f"unknown entries in the config: {', '.join(unknown)}")
        values["embed"] = _part(values.get("embed"), _EMBEDS, "embed")
        values["head"] = _part(values.get("head"), _HEADS, "head")
        try:
            return cls(**_tuples(values))
        except TypeError as error:
            raise ArgumentError(f"the config does not fit: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists, which JSON makes of tuples, as tuples again."""
    return {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}


def _part(values: Any, kinds: dict[str, Any], name: str) -> Any:
    if not isinstance(values, dict) or values.get("kind") not in kinds:
        kind = values.get("kind") if isinstance(values, dict) else values
        raise ArgumentError(str(UnknownNameError(kind, kinds, f"This is the config's {name!r}")))
    try:
        return kinds[values["kind"]](**_tuples(values))
    except TypeError as error:
        raise ArgumentError(f"the config's {name!r} does not fit: {error}") from error
