"""Hook points: what each one is, said once, where its module makes it.

A module declares ``self.hook_z = Hook("row pos head d_head")``. What anybody asks about a hook
point follows from that and from its name: ``model.point(name)`` gives its axes, their sizes, its
layer, where a run that reads it may stop and one that edits it may start, and why it is silent.

A new hook point is a line in its module. A new site of sweeps is one more row of :data:`SITES`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tstlens.arguments import check_slice, shown
from tstlens.errors import ArgumentError, HookError

ROWS = ("row", "batch")  # of the trunk; of the series as given
AXES = ("channel", "time", "pos", "head", "query", "key")  # any other word names the features
NO_FEATURES = ("1", "parameter")  # a last axis that no dictionary can read

Index = int | slice | Sequence[int] | None


class Hook(HookPoint):
    """A hook point that says what its activation is.

    Args:
        layout: its axes, ``"row pos head d_head"``. The first is ``row`` (of the trunk) or
            ``batch`` (series); then come some of :data:`AXES`, and last the features, by the name
            of their size in the config where it has one.
        needs: the flag of the config without which it does not fire.

    What reads it without being a hook stands in ``readers``: they are given the activation as
    hooks left it, and fast paths count them as somebody who listens (``intercepts``).
    """

    def __init__(self, layout: str, needs: str | None = None) -> None:
        super().__init__()
        self.layout = tuple(layout.split())
        self.needs = needs
        self.readers: list[Callable[[Tensor], None]] = []

    @classmethod
    def like(cls, point: HookPoint) -> Hook:
        """A hook point with the hooks and the name of one that says nothing of itself."""
        hook = cls("")
        hook.__dict__.update(point.__dict__)
        return hook

    def __call__(self, activation: Tensor) -> Tensor:
        activation = super().__call__(activation)
        for reader in self.readers:
            reader(activation)
        return activation


@dataclass(frozen=True)
class Point:
    """A hook point as it is in one model.

    Args:
        name: its name.
        layout: its axes as :class:`Hook` declares them; empty where nobody declared them, as at a
            hook point in a module of the user's own.
        sizes: sizes of axes that the config knows, by the word in the layout.
        layer: the layer that it lies in; None outside the blocks.
        start: the layer that a run which edits it may start at; None starts with the series.
        stop: the layer that a run which reads it may stop before; None runs through the head.
        silent: why it cannot fire as the model is set; None where it can.
    """

    name: str
    layout: tuple[str, ...]
    sizes: Mapping[str, int]
    layer: int | None
    start: int | None
    stop: int | None
    silent: str | None = None

    @property
    def by_row(self) -> bool:
        """Whether its first axis holds rows of the trunk, not series."""
        return self.layout[:1] == ("row",)

    @property
    def axes(self) -> tuple[str, ...]:
        """Its axes after the first, the last one's as ``feature``; as patching names them."""
        return tuple(axis if axis in AXES else "feature" for axis in self.layout[1:])

    @property
    def features(self) -> bool:
        """Whether its last axis holds features, or nobody said."""
        return not self.layout or self.layout[-1] not in (*AXES, *NO_FEATURES)

    @property
    def width(self) -> int | None:
        """Entries of the last axis; None where the config does not tell."""
        return self.sizes.get(self.layout[-1]) if self.layout else None

    @property
    def n_heads(self) -> int | None:
        """Heads, where it has them beside the features; None elsewhere."""
        return self.sizes.get("head") if self.layout[-2:-1] == ("head",) else None

    @property
    def joins(self) -> bool:
        """Whether its heads may be read as one vector: at q, k, v and z."""
        return self.layout[-2:] == ("head", "d_head")

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """Sizes of the feature axes, (head, width) or (width,); None where the config is silent."""
        if self.width is None or not self.features:
            return None
        return (self.width,) if self.n_heads is None else (self.n_heads, self.width)

    @property
    def pos_axis(self) -> int | None:
        """The axis of the trunk's (query) positions; None where there is none to slice."""
        return pos_axis(self.name, self.layout)

    def require_features(self) -> None:
        """Raise :class:`HookError` unless its last axis holds features."""
        if not self.features:
            axes = ", ".join(self.layout)
            raise HookError(f"{self.name} [{axes}] has no feature axis for a dictionary to read")


def pos_axis(name: str, layout: Sequence[str]) -> int | None:
    """See :attr:`Point.pos_axis`; without a layout positions come right after rows."""
    if name == "hook_series" or name.startswith(("embed.", "head.")):
        return None
    return next((n for n, axis in enumerate(layout) if axis in ("pos", "query")), 1)


_IN_BLOCK = re.compile(r"(blocks|encoder|decoder)\.(\d+)\.(.+)")


def in_block(name: str) -> tuple[str, int, str] | None:
    """``("decoder", 1, "attn.hook_z")``: stack, number in it, and the name within a block."""
    found = _IN_BLOCK.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), found[3])


def layer_of(name: str, n_encoder_layers: int | None = None) -> int | None:
    """The layer that a hook name lies in, counted through encoder and decoder.

    None outside the blocks, and in a decoder where nobody says how many layers the encoder has.
    """
    found = in_block(name)
    if found is None or found[0] != "decoder":
        return None if found is None else found[1]
    return None if n_encoder_layers is None else n_encoder_layers + found[1]


_ATTENTION = ("q", "k", "v", "z", "result", "pattern", "attn_scores")
SITES: dict[str, tuple[str, str]] = {  # short name -> hook name, and what it is in words
    "series": ("hook_series", "the input series"),
    "embed": ("hook_embed", "the embedding"),
    "pos_embed": ("hook_pos_embed", "the position embedding"),
    "pooled": ("head.hook_pooled", "the pooled vector"),
    "encoded": ("hook_encoded", "what the encoder gives"),
    "decoder_embed": ("hook_decoder_embed", "the decoder's embedding"),
    "resid_pre": ("{block}.hook_resid_pre", "the residual stream before the block"),
    "resid_mid": ("{block}.hook_resid_mid", "the residual stream after attention"),
    "resid_post": ("{block}.hook_resid_post", "the residual stream after the block"),
    "normalized_resid_post": (
        "{block}.hook_normalized_resid_post",
        "the residual stream after the block's norm",
    ),
    "attn_out": ("{block}.hook_attn_out", "the attention output"),
    "mlp_out": ("{block}.hook_mlp_out", "the MLP output"),
    "q": ("{block}.attn.hook_q", "the head's queries"),
    "k": ("{block}.attn.hook_k", "the head's keys"),
    "v": ("{block}.attn.hook_v", "the head's values"),
    "z": ("{block}.attn.hook_z", "the head's output (z)"),
    "result": ("{block}.attn.hook_result", "the head's result"),
    "pattern": ("{block}.attn.hook_pattern", "the attention pattern"),
    "attn_scores": ("{block}.attn.hook_attn_scores", "the attention scores"),
    **{
        f"{second}_{name}": (f"{{block}}.{second}_attn.hook_{name}", f"{second}_{name}")
        for second in ("channel", "cross")
        for name in _ATTENTION
    },
    **{
        name: (f"{{block}}.hook_{name}", name)
        for name in ("channel_attn_out", "cross_attn_out", "resid_mid_channel", "resid_mid_cross")
    },
    "mlp_pre": (
        "{block}.mlp.hook_pre",
        "the MLP's hidden layer (before the nonlinearity)",
    ),
    "mlp_post": ("{block}.mlp.hook_post", "the MLP's hidden layer"),
}
# What TransformerLens 4 calls hook points of a block; the first that the model has is meant.
ALIASES: dict[str, tuple[str, ...]] = {
    "hook_in": ("hook_resid_pre",),
    "hook_out": ("hook_normalized_resid_post", "hook_resid_post"),
    "attn.hook_out": ("hook_attn_out",),
    "mlp.hook_in": ("hook_mlp_in",),
    "mlp.hook_out": ("hook_mlp_out",),
}


def real_name(name: str, known: Iterable[str]) -> str:
    """A hook name with TransformerLens 4's words replaced by those that the model has."""
    found = in_block(name)
    if name in known or found is None or found[2] not in ALIASES:
        return name
    names = [f"{found[0]}.{found[1]}.{own}" for own in ALIASES[found[2]]]
    return next((own for own in names if own in known), name)


_WHY_ABSENT = (  # pattern of a name that the model lacks -> why, or what to take instead
    ("*hook_pos_embed", "This model adds no positions"),
    (
        "*hook_attn_in",
        "model.set_use_split_qkv_input(True) gives hook_q_input, hook_k_input and hook_v_input of "
        "every head instead",
    ),
    ("*channel_attn*", "This model's blocks have no such attention"),
    ("*cross_attn*", "This model's blocks have no such attention"),
    (
        "*hook_attn_mlp_sum",
        "Only pre-norm models have it: a post-norm model normalises the stream between attention "
        "and MLP, so no sum of the two is added to anything",
    ),
    ("*hook_normalized_resid_post", "Only post-norm models normalise what leaves a block"),
    ("blocks.*", "This model's layers are encoder.{l} and decoder.{l}"),
    ("ln_final*", "This model has no final norm"),
    ("encoder_final_ln*", "This model has no final norm"),
    ("decoder_final_ln*", "This model has no final norm"),
    ("*", "model.hook_dict lists them all"),
)


def why_absent(name: str, has_decoder: bool) -> str:
    """What to tell somebody who asks for a hook point that a model lacks."""
    return next(
        why
        for pattern, why in _WHY_ABSENT
        if fnmatch.fnmatchcase(name, pattern) and (pattern != "blocks.*" or has_decoder)
    )


def select(index: Any, size: int, axis: str) -> list[int]:
    """What an index selects of an axis, as numbers from 0 in the order given.

    Args:
        index: None for the whole axis, an integer, several (a list, an array, a tensor), or a
            slice that lies within the axis; negative counts from the end.
        size: entries of the axis.
        axis: its name, for errors.

    Raises:
        ArgumentError: not an index, one outside the axis, or nothing selected.

    Example:
        >>> select(slice(-3, None), 25, "pos"), select([0, -1], 25, "pos")
        ([22, 23, 24], [0, 24])
    """
    if index is None:
        return list(range(size))
    if isinstance(index, slice):
        check_slice(index, size, axis)
        return list(range(size)[index])
    numbers = whole_numbers(index, axis)
    for number in numbers:
        if not -size <= number < size:
            raise ArgumentError(f"expected {axis} in 0..{size - 1}, got {number}")
    if not numbers:
        raise ArgumentError(f"{axis}={index} selects nothing of 0..{size - 1}")
    return [number % size for number in numbers]


def whole_numbers(given: Any, what: str) -> list[int]:
    """One integer or several as a list; nothing is rounded, and True is no 1."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    several = isinstance(plain, Iterable) and not isinstance(plain, str | Mapping)
    numbers: list[Any] = list(plain) if several else [plain]
    if not all(hasattr(n, "__index__") and not isinstance(n, bool) for n in numbers):
        raise ArgumentError(f"expected {what} as an integer or several, got {shown(given)}")
    return [int(number) for number in numbers]
