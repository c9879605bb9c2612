"""What a :class:`HookedTST` is made of: a validated configuration with a JSON round trip."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tstlens.arguments import Amount, Count, Positive, Seed, check_fields
from tstlens.data.labels import as_names
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.family_index import part_kinds
from tstlens.model.parts import (
    EMBEDS,
    HEADS,
    ActFn,
    ConvStemConfig,
    CustomConfig,
    EmbedConfig,
    FamilyPart,
    HeadConfig,
    LinearPatchesConfig,
    part_class,
)

Positions = Literal["learned", "sinusoidal", "none"]
NormPosition = Literal["pre", "post"]
NormType = Literal["LN", "RMS", "BN"]
QKNorm = Literal["none", "before_rotary", "after_rotary"]
SecondAttention = Literal["none", "channel", "cross"]


@dataclass
class HookedTSTConfig:
    """Sizes and options of a :class:`HookedTST`, with TransformerLens' names where it has them.

    Args:
        n_layers: blocks of the trunk; of an encoder and a decoder together.
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
        normalization_type: ``"LN"``, ``"RMS"``, or ``"BN"`` for a batch norm over d_model with its
            running statistics (a fixed affine map, in training too).
        mlp_normalization_type: of the norm of the MLP, where it differs from the others.
        use_normalization_before_and_after: pre-norm blocks also normalise what each sublayer
            writes (``ln1_post``, ``ln2_post``).
        final_norm: whether a norm stands between the last block and the head.
        norm_embed: whether what enters block 0 is normalised (``ln_embed``).
        last_norm: of post-norm blocks, whether the last one ends with its norm.
        final_normalization_type: of the final norm, where it differs from the others.
        eps: added to the variance in each norm.
        attn_scale: scores are divided by it; ``sqrt(d_head)`` where None.
        causal: whether a position sees only itself and what is before it.
        attn_bias: whether q, k, v and the output projection have biases.
        gated_mlp: the MLP multiplies ``act(x W_gate)`` with ``x W_in``.
        position_buckets: buckets of T5's relative position bias, which one table gives to every
            layer; None for no bias.
        position_max_distance: distance from which all positions share a bucket.
        rotary_base: base of rotary position embeddings on q and k; None for none.
        qk_norm: RMS norm of every head's q and k, before or after they are rotated.
        query_scale: a learned factor for every dimension of queries, the last thing before their
            products with keys (TimesFM).
        residual_attention: every layer adds the scores of the layer before to its own.
        second_attention: a second attention in every block, between the first and the MLP:
            ``"channel"`` mixes the channels of a series at each position, ``"cross"`` reads
            ``TrunkState.encoded``.
        n_decoder_layers: how many of the layers, the last ones, are a decoder's, which reads the
            other layers' output by cross attention; 0 for a trunk of one stack.
        mlp_bias: whether the MLP's two maps have biases.
        class_names: names of the classes, for figures.
        model_name: what the report calls the model.
        seed: of the weights of a new model.
        use_attn_result: fire ``attn.hook_result`` (one vector per head; costs memory).
        use_split_qkv_input: fire ``hook_q_input``, ``hook_k_input``, ``hook_v_input``.
        use_hook_mlp_in: fire ``hook_mlp_in``.
        use_attn_mlp_sum: fire ``hook_attn_mlp_sum`` (pre-norm models).
        use_fused: attention and norms run fused while nobody watches them, which is faster and
            rounds differently (about 1e-6 in float32). False computes every point in every run, so
            that watched and unwatched runs agree bit for bit.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    n_layers: Count
    d_model: Count
    n_heads: Count
    d_mlp: Count
    embed: EmbedConfig
    head: HeadConfig | CustomConfig | FamilyPart
    d_head: Count | None = None
    n_channels: Count | None = None
    n_time: Count | None = None
    n_ctx: Count | None = None
    positions: Positions = "none"
    act_fn: ActFn = "relu"
    norm_position: NormPosition = "pre"
    normalization_type: NormType = "LN"
    final_norm: bool = False
    norm_embed: bool = False
    last_norm: bool = True
    eps: Positive = 1e-5
    attn_scale: Positive | None = None
    causal: bool = False
    attn_bias: bool = True
    mlp_bias: bool = True
    gated_mlp: bool = False
    mlp_normalization_type: NormType | None = None
    final_normalization_type: NormType | None = None
    use_normalization_before_and_after: bool = False
    position_buckets: Count | None = None
    position_max_distance: Count = 128
    rotary_base: Positive | None = None
    qk_norm: QKNorm = "none"
    query_scale: bool = False
    residual_attention: bool = False
    second_attention: SecondAttention = "none"
    n_decoder_layers: Amount = 0
    class_names: tuple[str, ...] | None = None
    model_name: str = "HookedTST"
    seed: Seed = 0
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_mlp_sum: bool = False
    use_fused: bool = True
    attn_only: bool = field(default=False, init=False)
    n_key_value_heads: None = field(default=None, init=False)
    device: str | torch.device = field(default="cpu", init=False)
    dtype: torch.dtype = field(default=torch.float32, init=False)

    def __post_init__(self) -> None:
        if self.class_names is not None:
            self.class_names = as_names(self.class_names)
        check_fields(self)
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ArgumentError(
                    f"d_model={self.d_model} does not divide into n_heads={self.n_heads} heads; "
                    "give d_head"
                )
            self.d_head = self.d_model // self.n_heads
        if self.use_normalization_before_and_after and self.norm_position == "post":
            raise ArgumentError("use_normalization_before_and_after is for pre-norm blocks only")
        if not self.last_norm and (self.norm_position == "pre" or self.second_attention != "none"):
            raise ArgumentError(
                "last_norm=False is for post-norm blocks of attention and MLP; other blocks end "
                "without a norm, or cannot leave it out"
            )
        if self.norm_embed and self.n_decoder_layers:
            raise ArgumentError("norm_embed is for trunks of one stack, not for n_decoder_layers")
        self._check_stacks()
        if self.rotary_base is not None and (self.d_head or 0) % 2:
            raise ArgumentError(f"rotary embeddings need an even d_head, got {self.d_head}")
        if self.class_names is not None:
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

    def _check_stacks(self) -> None:
        """A decoder needs an encoder before it, and options that both can have."""
        n_decoder = self.n_decoder_layers
        if n_decoder >= self.n_layers:
            raise ArgumentError(
                f"expected n_decoder_layers of 0 to {self.n_layers - 1}, so that n_layers="
                f"{self.n_layers} leaves an encoder, got {n_decoder!r}"
            )
        if n_decoder and (self.residual_attention or self.second_attention != "none"):
            raise ArgumentError(
                "an encoder and a decoder go with neither residual_attention nor "
                "second_attention: decoder layers have cross attention of their own"
            )

    def _check_front_end(self, embed: Any) -> None:
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
            if self.n_ctx is not None and self.n_ctx < n_pos:
                raise ArgumentError(
                    f"a series of {self.n_time} samples makes {n_pos} positions, "
                    f"but n_ctx={self.n_ctx}"
                )

    @property
    def channel_independent(self) -> bool:
        """Whether every channel goes through the trunk by itself."""
        return bool(getattr(self.embed, "channel_independent", False))

    @property
    def rows_per_series(self) -> int:
        """Rows of the trunk per series: 1, or a row per channel (and per sign; see TimesFM 2.5)."""
        if not self.channel_independent:
            return 1
        return (self.n_channels or 1) * self.n_passes

    @property
    def n_passes(self) -> int:
        """Rows of the trunk per channel: 2 where the mirrored series goes through it too."""
        return int(getattr(self.embed, "n_signs", 1))

    @property
    def n_encoder_layers(self) -> int:
        """Layers before the decoder; all of them where there is none."""
        return self.n_layers - self.n_decoder_layers

    @property
    def n_params(self) -> int:
        """Weights of attention and MLPs, without biases and norms, as TransformerLens counts."""
        n_attentions = self.n_layers * (1 + (self.second_attention != "none"))
        n_attentions += self.n_decoder_layers
        attention = 4 * self.d_model * (self.d_head or 0) * self.n_heads
        mlp = (3 if self.gated_mlp else 2) * self.d_model * self.d_mlp
        return n_attentions * attention + self.n_layers * mlp

    @property
    def positions_are(self) -> str:
        """What a position of the trunk is: ``"time"`` (a patch, a step), or ``"channel"``."""
        return getattr(self.embed, "positions_are", "time")

    @property
    def n_classes(self) -> int | None:
        """Logits of a classifier; None for a forecaster or a head of the user's own."""
        return getattr(self.head, "n_classes", None)

    @property
    def horizon(self) -> int | None:
        """Steps of a forecast; None for a classifier or a head of the user's own."""
        return getattr(self.head, "horizon", None)

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
        for name in ("embed", "head"):
            values[name] = dataclasses.asdict(getattr(self, name))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HookedTSTConfig:
        """Build a config from :meth:`to_dict`'s dictionary.

        Raises:
            ArgumentError: an entry is unknown or impossible.
        """
        if not isinstance(values, dict):
            raise ArgumentError(f"expected to_dict()'s dictionary, got {type(values).__name__}")
        values = dict(values)
        known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ArgumentError(f"unknown entries in the config: {', '.join(unknown)}")
        values["embed"] = _part(values.get("embed"), EMBEDS, "embed")
        values["head"] = _part(values.get("head"), HEADS, "head")
        try:
            return cls(**_tuples(values))
        except TypeError as error:
            raise ArgumentError(f"the config does not fit: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists, which JSON makes of tuples, as tuples again."""
    return {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}


def _part(values: Any, kinds: dict[str, Any], name: str) -> Any:
    kind = values.get("kind") if isinstance(values, dict) else values
    made = part_class(kind, kinds)
    if not isinstance(values, dict) or made is None:
        known = [*kinds, *part_kinds()]
        raise ArgumentError(str(UnknownNameError(kind, known, f"This is the config's {name!r}")))
    try:
        return made(**_tuples(values))
    except TypeError as error:
        raise ArgumentError(f"the config's {name!r} does not fit: {error}") from error
