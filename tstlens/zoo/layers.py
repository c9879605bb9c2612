"""Encoder layers under any names, and state dicts that are read entry by entry.

A ``LayerTable`` says once which of a source's modules is which part of a block; the weights
(``fill``) and the layer-by-layer comparison (``find``) both follow from it. ``Entries`` reads a
state dict and knows what is left over. ``Restated`` runs the same weights as the source does, in
plain PyTorch, where only weights were given; ``RestatedTsl`` holds what the models of
Time-Series-Library have in common.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tstlens.arguments import shown
from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HookedTST
from tstlens.zoo.comparing import Tap


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module's parameters and buffers by name.

    Raises:
        StateDictError: a weight has no place in the module, or another shape.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            expected = list(own[name].shape) if name in own else "no such weight"
            raise StateDictError(f"{name}: expected {expected}, got {list(weight.shape)}")
        own[name].copy_(weight)


def check_keys(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str) -> None:
    """Raise :class:`StateDictError` unless a state dict has the expected names and shapes."""
    missing = sorted(set(expected) - set(given))
    extra = sorted(set(given) - set(expected))
    misshapen = [
        f"{name} is {list(given[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:4])})")
    if extra:
        problems.append(f"{len(extra)} unexpected ({', '.join(extra[:4])})")
    problems += misshapen[:4]
    if problems:
        raise StateDictError(
            f"this state dict does not fit family {family!r}: {'; '.join(problems)}; "
            "check that it is the whole model's state dict and nothing else"
        )


def shortest(embed: Any, n_pos: int) -> int:
    """The least length of a series that makes so many positions."""
    n_time = 1
    while embed.n_pos(n_time) < n_pos:
        n_time += 1
    return n_time


ACT = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Entries(Mapping[str, Tensor]):
    """A state dict that remembers which entries were read.

    Args:
        state: names and tensors.
        family: for the errors.
    """

    def __init__(self, state: Mapping[str, Tensor], family: str) -> None:
        self.state, self.family, self.read = dict(state), family, set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.state:
            raise StateDictError(
                f"this state dict does not fit family {self.family!r}: {name} is missing; its "
                f"first entries are {', '.join(list(self.state)[:4]) or 'none'}"
            )
        self.read.add(name)
        return self.state[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An entry, or the default where there is none."""
        return self[name] if name in self.state else default

    def __iter__(self) -> Any:
        return iter(self.state)

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __len__(self) -> int:
        return len(self.state)

    def n_layers(self, prefix: str) -> int:
        """How many layers stand under a prefix, numbered from 0 without gaps."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        found = {int(match[1]) for name in self.state if (match := pattern.match(name))}
        if found != set(range(len(found))) or not found:
            raise StateDictError(
                f"this state dict does not fit family {self.family!r}: expected layers "
                f"{prefix}0, 1, ... without gaps, got {sorted(found) or 'none'}"
            )
        return len(found)

    def check_all_read(self, but: Iterable[str] = ()) -> None:
        """Raise :class:`StateDictError` for entries that nothing was copied from.

        Args:
            but: regular expressions of names that may stay (``num_batches_tracked`` always may).
        """
        may_stay = [re.compile(pattern) for pattern in (*but, r".*num_batches_tracked$")]
        left = [
            name
            for name in self.state
            if name not in self.read and not any(pattern.match(name) for pattern in may_stay)
        ]
        if left:
            raise StateDictError(
                f"this state dict does not fit family {self.family!r}: {len(left)} unexpected "
                f"({', '.join(left[:4])}); check that it is the whole model's state dict and "
                "nothing else"
            )


# From the source's weight and bias to ours, by the last word of our part's name.
_PATTERNS = {
    **dict.fromkeys("QKV", ("(h d) m -> h m d", "(h d) -> h d")),
    "QKV": ("(n h d) m -> n h m d", "(n h d) -> n h d"),  # packed, as torch.nn has them
    "O": ("m (h d) -> h d m", "m -> m"),
    **dict.fromkeys(("in", "gate", "out"), ("o i -> i o", "o -> o")),
}
_WRITTEN = {
    "attn.O": "hook_attn_out",
    "cross_attn.O": "hook_cross_attn_out",
    "channel_attn.O": "hook_channel_attn_out",
    "mlp.out": "hook_mlp_out",
}
RESID_PRE = Tap("hook_resid_pre", "", of="input")
RESID_POST = Tap("hook_resid_post", "", lambda seen: first(seen))
NORMALIZED_POST = Tap("hook_normalized_resid_post", "", lambda seen: first(seen))


@dataclass(frozen=True)
class LayerTable:
    """Which of a source's modules is which part of a block: its weights and its activations.

    Args:
        rows: our part -> the source's module within its layer: ``"attn.Q": "self_attn.q_proj"``
            (``K``, ``V``, ``O``, or ``QKV`` packed; ``cross_attn`` and ``channel_attn`` alike),
            ``"mlp.in": "fc1"`` (``gate``, ``out``), ``"ln1": "norm1"``. A name with a leaf of its
            own (``"attn.q_scale.w": "self_attn.scaling"``) is a parameter that is taken as it is.
        taps: what the rows do not tell, with paths within the layer (``""`` is the layer itself).
        scale: a parameter that the source multiplies scores by.
    """

    rows: Mapping[str, str]
    taps: tuple[Tap, ...] = ()
    scale: str | None = None

    def __getitem__(self, part: str) -> str:
        return self.rows[part]

    def weights(
        self, block: Any, state: Mapping[str, Tensor], prefix: str = ""
    ) -> dict[str, Tensor]:
        """The block's weights from the source's; what that lacks (biases, say) is not among them.

        Args:
            block: of the hooked model, for its sizes.
            state: the source's weights.
            prefix: of the layer in them, with the last dot.
        """
        found: dict[str, Tensor] = {}
        for part, theirs in self.rows.items():
            owner, _, leaf = part.rpartition(".")
            if leaf in _PATTERNS:
                found |= _projections(block, owner, leaf, linear(state, prefix + theirs))
            elif leaf == "w":
                found[part] = state[prefix + theirs]
            else:
                norm = norm_entries(state, prefix + theirs, block.get_submodule(part))
                found |= {f"{part}.{name}": tensor for name, tensor in norm.items()}
        return found

    def fill(self, block: Any, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy a layer into a block; biases that the source lacks stay zero.

        Raises:
            StateDictError: a weight has another shape than the block's, or is missing.
        """
        try:
            fill(block, self.weights(block, state, prefix))
        except StateDictError as error:
            if not isinstance(state, Entries) or state.family in str(error):
                raise
            raise StateDictError(
                f"this state dict does not fit family {state.family!r}: layer {prefix[:-1]}, as "
                f"{error}; its layers, or n_heads={block.attn.W_Q.shape[0]}, do not go together"
            ) from error

    def find(
        self,
        model: HookedTST,
        here: str,
        there: str,
        layouts: Mapping[str, Callable[[Any], Tensor]] | None = None,
        observed_only: bool = False,
    ) -> list[Tap]:
        """Where a live layer computes a block's activations.

        Args:
            model: the hooked model.
            here: the block's name.
            there: the layer's path.
            layouts: by the first word of a part, from what its module gives to [row, pos, width].
            observed_only: see :class:`Tap`.
        """
        found = []
        given = dict(layouts or {})

        def add(name: str, path: str, transform: Any, of: Any = "output", call: int = 0) -> None:
            where = f"{there}.{path}" if path else there
            found.append(Tap(f"{here}.{name}", where, transform, of, call, observed_only))

        told = {tap.hook_name for tap in self.taps}
        packed = any(part.endswith("QKV") for part in self.rows)  # torch calls no projection
        for part, path in self.rows.items():
            owner, _, leaf = part.rpartition(".")
            layout = given.get(owner, _same)
            if leaf in ("Q", "K", "V"):
                by_head = partial(_per_head, model.cfg.n_heads, model.cfg.d_head, layout)
                add(f"{owner}.hook_{leaf.lower()}", path, by_head)
            elif leaf == "O" and not packed:
                by_head = partial(_per_head, model.cfg.n_heads, model.cfg.d_head, layout)
                add(f"{owner}.hook_z", path, by_head, "input")
            elif leaf == ("gate" if "mlp.gate" in self.rows else "in"):
                add("mlp.hook_pre", path, layout)
            elif leaf == "out":
                add("mlp.hook_post", path, layout, "input")
            if part in _WRITTEN and _WRITTEN[part] not in told and not (packed and leaf == "O"):
                add(_WRITTEN[part], path, layout)
        for tap in self.taps:
            add(tap.hook_name, tap.module_path, tap.transform, tap.of, tap.call)
        return found


def _same(seen: Tensor) -> Tensor:
    return seen


def first(seen: Any) -> Tensor:
    """What a module gave, or the first of it."""
    return seen[0] if isinstance(seen, tuple | list) else seen


def second(seen: Any) -> Tensor:
    """The second of what a module gave."""
    return seen[1]


def _per_head(
    n_heads: int, d_head: int | None, layout: Callable[[Any], Tensor], seen: Any
) -> Tensor:
    """[row, pos, head, d_head]; keys and values that heads share are repeated for each."""
    apart = layout(seen).unflatten(-1, (-1, d_head or 1))
    return apart.repeat_interleave(n_heads // apart.shape[-2], -2)


def _projections(
    block: Any, owner: str, leaf: str, given: tuple[Tensor, Tensor | None]
) -> dict[str, Tensor]:
    """The weight and the bias of one row; keys and values that heads share are repeated."""
    attention, found = owner.endswith("attn"), {}
    n_heads, _, d_head = block.get_submodule(owner).W_Q.shape if attention else (0, 0, 0)
    for kind, tensor, pattern in zip("Wb", given, _PATTERNS[leaf], strict=True):
        if tensor is None:
            continue
        if not attention or pattern == "m -> m":
            found[f"{owner}.{kind}_{leaf}"] = einops.rearrange(tensor, pattern)
            continue
        sizes = {"d": d_head} | ({"n": 3} if leaf == "QKV" else {})
        try:
            apart = einops.rearrange(tensor, pattern, **sizes)
        except einops.EinopsError as error:
            raise StateDictError(
                f"{owner}.{kind}_{leaf}: {list(tensor.shape)} is no {pattern.split(' ->')[0]} with "
                f"d_head={d_head}"
            ) from error
        parts = dict(zip(leaf, apart, strict=True)) if leaf == "QKV" else {leaf: apart}
        for letter, one in parts.items():
            shared = n_heads // len(one) if letter in "KV" and len(one) else 1
            found[f"{owner}.{kind}_{letter}"] = one.repeat_interleave(max(shared, 1), 0)
    return found


def linear(entries: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear map or a convolution of width 1."""
    dot = "." if f"{name}.weight" in entries or f"{name}_weight" not in entries else "_"
    weight = entries[f"{name}{dot}weight"]
    if weight.ndim == 3 and weight.shape[2] == 1:
        weight = weight[:, :, 0]
    return weight, entries.get(f"{name}{dot}bias")


def norm_entries(entries: Mapping[str, Tensor], name: str, norm: nn.Module) -> dict[str, Tensor]:
    """``w``, ``b`` and, of a batch norm, the running statistics.

    Args:
        entries: the source's weights; of :class:`Entries` none that the norm has may be missing.
        name: of the norm in them.
        norm: the one they are for.
    """
    leaves = {"w": "weight", "b": "bias", "running_mean": "running_mean"}
    leaves["running_var"] = "running_var"
    needed = set(norm.state_dict()) if isinstance(entries, Entries) else {"w"}
    return {
        ours: entries[f"{name}.{theirs}"]
        for ours, theirs in leaves.items()
        if ours in needed or f"{name}.{theirs}" in entries
    }


TORCH_LAYER = LayerTable(
    {
        "attn.QKV": "self_attn.in_proj",
        "attn.O": "self_attn.out_proj",
        "mlp.in": "linear1",
        "mlp.out": "linear2",
        "ln1": "norm1",
        "ln2": "norm2",
    }
)


def torch_layer_taps(prefix: str, model: HookedTST, batch_first: bool = True) -> list[Tap]:
    """Where ``torch.nn.TransformerEncoderLayer`` modules compute the blocks' activations.

    Args:
        prefix: path of the list of layers.
        model: the hooked model.
        batch_first: whether the encoder's tensors are [batch, pos, ...] or [pos, batch, ...].
    """

    def ours(seen: Any) -> Tensor:
        return first(seen) if batch_first else first(seen).transpose(0, 1)

    post = model.cfg.norm_position == "post"
    leaving = "hook_normalized_resid_post" if post else "hook_resid_post"
    table = LayerTable(
        TORCH_LAYER.rows,
        (
            Tap("hook_resid_pre", "", ours, "input"),
            Tap("hook_attn_out", "self_attn", ours),
            Tap(leaving, "", ours),
        ),
    )
    layers = range(model.cfg.n_layers)
    return [
        tap
        for layer in layers
        for tap in table.find(model, f"blocks.{layer}", f"{prefix}.{layer}", {"mlp": ours})
    ]


def flatten_by_pos(weight: Tensor, n_pos: int, n_channels: int = 1) -> Tensor:
    """A head's weight over ``[channel, d_model, pos]`` as rows over ``[channel, pos, d_model]``.

    Args:
        weight: [output, channel * d_model * pos].
        n_pos: positions.
        n_channels: channels that stand side by side.
    """
    if weight.shape[1] % (n_pos * n_channels):
        raise StateDictError(
            f"the head reads {weight.shape[1]} numbers, which do not divide into {n_pos} positions"
            + (f" of {n_channels} channels" if n_channels > 1 else "")
        )
    return einops.rearrange(weight, "out (c d p) -> (c p d) out", c=n_channels, p=n_pos)


class Restated(nn.Module):
    """A source's weights under their own names, and its arithmetic in plain PyTorch.

    Subclasses write ``forward``; they share none of the hooked model's code.

    Args:
        state: the source's state dict.
        eps: of its norms.
    """

    def __init__(self, state: Mapping[str, Tensor], eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self._places: dict[str, str] = {}
        for number, (name, tensor) in enumerate(state.items()):
            self._places[name] = f"entry{number}"
            self.register_buffer(f"entry{number}", tensor.detach())

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, self._places[name])

    def get(self, name: str) -> Tensor | None:
        """An entry, or None where there is none."""
        place = self._places.get(name)
        return None if place is None else getattr(self, place)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``nn.Linear``, or ``nn.Conv1d`` of width 1 over the last axis."""
        weight = self[f"{name}.weight"]
        bias = self.get(f"{name}.bias")
        if weight.ndim == 3:
            return F.conv1d(x.transpose(1, 2), weight, bias).transpose(1, 2)
        return F.linear(x, weight, bias)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Batch norm over the last axis where there are running statistics, else layer norm."""
        weight, bias = self[f"{name}.weight"], self[f"{name}.bias"]
        if f"{name}.running_mean" not in self:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        mean, var = self[f"{name}.running_mean"], self[f"{name}.running_var"]
        by_row = x.reshape(-1, x.shape[-1])
        return F.batch_norm(by_row, mean, var, weight, bias, False, 0.0, self.eps).view_as(x)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: Any, keep: Tensor | None, before: Any
    ) -> tuple[Tensor, Tensor]:
        """Context [row, pos, width] and scores of [row, head, pos, d] queries, keys and values."""
        scores = (q @ k.transpose(2, 3)) * scale
        if before is not None:
            scores = scores + before
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores

    def encode(
        self,
        x: Tensor,
        prefix: str,
        names: LayerTable,
        n_heads: int,
        act_fn: str,
        residual_attention: bool = False,
        keep: Tensor | None = None,
        pre_norm: bool = False,
    ) -> Tensor:
        """Post-norm encoder layers, one after the other.

        Args:
            x: [row, pos, d_model].
            prefix: of the numbered layers.
            names: of a layer's parts.
            n_heads: attention heads.
            act_fn: of the MLP.
            residual_attention: each layer adds the scores of the one before.
            keep: bool [row, pos], False at keys that are hidden.
            pre_norm: the norms stand before their sublayers, on the stream itself.
        """
        before, layer = None, 0
        while f"{prefix}{layer}.{names['attn.Q']}.weight" in self:
            at = f"{prefix}{layer}."
            x = self.norm(x, at + names["ln1"]) if pre_norm else x
            q, k, v = (
                self.linear(x, at + name).unflatten(2, (n_heads, -1)).transpose(1, 2)
                for name in (names["attn.Q"], names["attn.K"], names["attn.V"])
            )
            scale: Any = q.shape[3] ** -0.5
            if names.scale is not None and at + names.scale in self:
                scale = self[at + names.scale]
            context, scores = self.attention(
                q, k, v, scale, keep, before if residual_attention else None
            )
            before, layer = scores, layer + 1
            x = x + self.linear(context, at + names["attn.O"])
            x = self.norm(x, at + (names["ln2"] if pre_norm else names["ln1"]))
            x = x + self.linear(
                ACT[act_fn](self.linear(x, at + names["mlp.in"])), at + names["mlp.out"]
            )
            x = x if pre_norm else self.norm(x, at + names["ln2"])
        return x


def activation_name(module: Any, where: str) -> str:
    """``"relu"``, ``"gelu"`` or ``"silu"`` of an activation module or function.

    Raises:
        UnsupportedSourceError: another one, naming where it is.
    """
    if isinstance(module, nn.ReLU) or module in (F.relu, torch.relu):
        return "relu"
    if module is F.gelu or (isinstance(module, nn.GELU) and module.approximate == "none"):
        return "gelu"
    if isinstance(module, nn.SiLU) or module is F.silu:
        return "silu"
    raise UnsupportedSourceError(
        f"{where} is {shown(module)}, which is not covered; relu, gelu and silu are"
    )


def read_options(
    source: nn.Module | Mapping[str, Tensor],
    family: str,
    defaults: Mapping[str, Any],
    told: Mapping[str, Any],
    read_live: Callable[[Any], Mapping[str, Any]],
    noun: str,
) -> tuple[Entries, dict[str, Any]]:
    """A source's weights, and the options that these do not tell.

    Args:
        source: a state dict, whose options are the defaults and what the user tells; or a live
            module, which knows them.
        family: for the errors.
        defaults: of a state dict's options.
        told: what the user said; None where nothing.
        read_live: the options of a live module.
        noun: what a user calls the model.
    """
    told = {name: value for name, value in told.items() if value is not None}
    if isinstance(source, Mapping):
        return Entries(source, family), {**defaults, **told}
    if told:
        raise ArgumentError(f"{', '.join(told)}: a live {noun} knows these itself; leave them out")
    return Entries(source.state_dict(), family), {**defaults, **read_live(source)}


STACK = "encoder.attn_layers."
EPS = 1e-5  # of every norm and of the scaling, fixed in the source
LAYER = LayerTable(
    {
        "attn.Q": "attention.query_projection",
        "attn.K": "attention.key_projection",
        "attn.V": "attention.value_projection",
        "attn.O": "attention.out_projection",
        "mlp.in": "conv1",
        "mlp.out": "conv2",
        "ln1": "norm1",
        "ln2": "norm2",
    },
    (NORMALIZED_POST,),
)


def fill_trunk(model: HookedTST, entries: Entries, final: str) -> None:
    """Copy all encoder layers, and the norm after them that is called ``final``."""
    for layer, block in enumerate(model.blocks):
        LAYER.fill(block, entries, f"{STACK}{layer}.")
    fill(model.ln_final, norm_entries(entries, final, model.ln_final))


class RestatedTsl(Restated):
    """What the two models share: scaling, encoder, final norm.

    Args:
        state: names and tensors.
        n_heads: attention heads.
        act_fn: of the MLPs.
    """

    def __init__(self, state: Mapping[str, Tensor], n_heads: int, act_fn: str) -> None:
        super().__init__(state, EPS)
        self.n_heads, self.act_fn = n_heads, act_fn

    def scaled(self, series: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Series [batch, channel, time] without mean and standard deviation, and both of these."""
        means = series.mean(2, keepdim=True)
        centred = series - means
        stdev = (centred.var(2, keepdim=True, unbiased=False) + EPS).sqrt()
        return centred / stdev, means, stdev

    def encoded(self, x: Tensor, final: str) -> Tensor:
        """The encoder's output [row, pos, d_model]."""
        return self.norm(self.encode(x, STACK, LAYER, self.n_heads, self.act_fn), final)


def tsl_taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where live encoder layers compute our activations; [row, pos, d_model] there too.

    Patterns are among them where the attention gives them (``output_attention=True``).
    """
    found = []
    for layer in range(model.cfg.n_layers):
        ours, theirs = f"blocks.{layer}", f"{STACK}{layer}"
        found += LAYER.find(model, ours, theirs, {"mlp": lambda seen: seen.transpose(1, 2)})
        attention = source.get_submodule(f"{theirs}.attention")
        if getattr(attention.inner_attention, "output_attention", False):
            found.append(Tap(f"{ours}.attn.hook_pattern", f"{theirs}.attention", second))
    return found
