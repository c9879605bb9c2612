"""Encoder layers whose projections are ``nn.Linear`` (or convolutions of width 1) under any names.

``Entries`` reads a state dict and knows what is left over; ``LayerNames`` says what a source calls
the parts of a layer; ``fill_layer`` copies them into a block; ``Restated`` runs the same weights
as the source does, in plain PyTorch, where only weights were given.

Weights of ``torch.nn.TransformerEncoderLayer`` in a block's layout.

Encoder layers of Time-Series-Library and neuralforecast: attention wrapped, MLP as convolutions.

Both name the parts alike; ``RestatedTsl`` holds what PatchTST and iTransformer have in common.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tstlens.arguments import shown
from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HookedTST
from tstlens.model.norms import BatchNorm
from tstlens.zoo.comparing import Tap


def block_weights(layer: Mapping[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """A block's state dict from an encoder layer's.

    Args:
        layer: ``self_attn.in_proj_weight`` [3 * d_model, d_model] and the rest, as PyTorch names
            them; biases may be missing.
        n_heads: heads that the packed projections hold.
    """

    def projection(name: str, part: int) -> Tensor:
        packed = layer[f"self_attn.in_proj_{name}"].chunk(3)[part]
        if name == "bias":
            return einops.rearrange(packed, "(head d_head) -> head d_head", head=n_heads)
        return einops.rearrange(
            packed, "(head d_head) d_model -> head d_model d_head", head=n_heads
        )

    weights = {
        "attn.W_Q": projection("weight", 0),
        "attn.W_K": projection("weight", 1),
        "attn.W_V": projection("weight", 2),
        "attn.W_O": einops.rearrange(
            layer["self_attn.out_proj.weight"],
            "d_model (head d_head) -> head d_head d_model",
            head=n_heads,
        ),
        "mlp.W_in": layer["linear1.weight"].T,
        "mlp.W_out": layer["linear2.weight"].T,
        "ln1.w": layer["norm1.weight"],
        "ln2.w": layer["norm2.weight"],
    }
    if "self_attn.in_proj_bias" in layer:
        for part, name in enumerate("QKV"):
            weights[f"attn.b_{name}"] = projection("bias", part)
    for ours, theirs in {
        "attn.b_O": "self_attn.out_proj.bias",
        "mlp.b_in": "linear1.bias",
        "mlp.b_out": "linear2.bias",
        "ln1.b": "norm1.bias",
        "ln2.b": "norm2.bias",
    }.items():
        if theirs in layer:
            weights[ours] = layer[theirs]
    return weights


def fill_block(block: nn.Module, layer: Mapping[str, Tensor], n_heads: int) -> None:
    """Copy an encoder layer's weights into a block; biases that the source lacks are zero."""
    fill(block, block_weights(layer, n_heads))


def layer_taps(
    prefix: str, n_layers: int, norm_position: str, batch_first: bool = True
) -> list[Tap]:
    """Where ``torch.nn.TransformerEncoderLayer`` modules compute a block's activations.

    Args:
        prefix: path of the list of layers.
        n_layers: how many there are.
        norm_position: ``"pre"`` or ``"post"``.
        batch_first: whether the encoder's tensors are [batch, pos, ...] or [pos, batch, ...].
    """

    def ours(seen: Any) -> Tensor:
        seen = seen[0] if isinstance(seen, tuple) else seen
        return seen if batch_first else seen.transpose(0, 1)

    leaving = "hook_normalized_resid_post" if norm_position == "post" else "hook_resid_post"
    taps = []
    for layer in range(n_layers):
        block, source = f"blocks.{layer}", f"{prefix}.{layer}"
        taps += [
            Tap(f"{block}.hook_resid_pre", source, ours, "input"),
            Tap(f"{block}.hook_attn_out", f"{source}.self_attn", ours),
            Tap(f"{block}.mlp.hook_pre", f"{source}.linear1", ours),
            Tap(f"{block}.hook_mlp_out", f"{source}.linear2", ours),
            Tap(f"{block}.{leaving}", source, ours),
        ]
    return taps


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


@dataclass(frozen=True)
class LayerNames:
    """What a source calls the parts of one encoder layer, without ``.weight`` and ``.bias``."""

    q: str
    k: str
    v: str
    o: str
    norm1: str
    mlp_in: str
    mlp_out: str
    norm2: str
    scale: str | None = None  # a parameter that scores are multiplied by


def linear(entries: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear map or a convolution of width 1."""
    weight = entries[f"{name}.weight"]
    if weight.ndim == 3 and weight.shape[2] == 1:
        weight = weight[:, :, 0]
    bias = f"{name}.bias"
    return weight, entries.get(bias)


def norm_entries(entries: Mapping[str, Tensor], name: str, norm: object) -> dict[str, Tensor]:
    """``w``, ``b`` and, of a batch norm, the running statistics.

    Args:
        entries: the source's weights.
        name: of the norm in them.
        norm: the one they are for.
    """
    found = {"w": entries[f"{name}.weight"], "b": entries[f"{name}.bias"]}
    if isinstance(norm, BatchNorm):
        found["running_mean"] = entries[f"{name}.running_mean"]
        found["running_var"] = entries[f"{name}.running_var"]
    return found


def fill_layer(
    block: nn.Module,
    entries: Entries,
    prefix: str,
    names: LayerNames,
    n_heads: int,
    norms: Mapping[str, str] | None = None,
) -> None:
    """Copy one encoder layer into a block; biases that the source lacks are zero.

    Args:
        block: of the hooked model.
        entries: the source's weights.
        prefix: of the layer in them, with the last dot.
        names: what its parts are called.
        n_heads: heads that the projections hold.
        norms: our norms -> the source's, in full, where they are not the layer's own two.
    """
    weights: dict[str, Tensor] = {}
    for ours, theirs in {"Q": names.q, "K": names.k, "V": names.v}.items():
        weight, bias = linear(entries, prefix + theirs)
        if len(weight) % n_heads:
            raise ArgumentError(
                f"{prefix}{theirs} has {len(weight)} outputs, which do not divide into "
                f"n_heads={n_heads} heads"
            )
        weights[f"attn.W_{ours}"] = einops.rearrange(weight, "(h d) m -> h m d", h=n_heads)
        if bias is not None:
            weights[f"attn.b_{ours}"] = einops.rearrange(bias, "(h d) -> h d", h=n_heads)
    weight, bias = linear(entries, prefix + names.o)
    weights["attn.W_O"] = einops.rearrange(weight, "m (h d) -> h d m", h=n_heads)
    if bias is not None:
        weights["attn.b_O"] = bias
    for part, theirs in {"in": names.mlp_in, "out": names.mlp_out}.items():
        weight, bias = linear(entries, prefix + theirs)
        weights[f"mlp.W_{part}"] = weight.T
        if bias is not None:
            weights[f"mlp.b_{part}"] = bias
    if norms is None:
        norms = {"ln1": prefix + names.norm1, "ln2": prefix + names.norm2}
    for ours, theirs in norms.items():
        found = norm_entries(entries, theirs, block.get_submodule(ours))
        weights |= {f"{ours}.{leaf}": tensor for leaf, tensor in found.items()}
    try:
        fill(block, weights)
    except StateDictError as error:
        raise StateDictError(
            f"this state dict does not fit family {entries.family!r}: layer {prefix[:-1]}, as "
            f"{error}; its layers, or n_heads={n_heads}, do not go together"
        ) from error


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
        names: LayerNames,
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
        while f"{prefix}{layer}.{names.q}.weight" in self:
            at = f"{prefix}{layer}."
            x = self.norm(x, at + names.norm1) if pre_norm else x
            q, k, v = (
                self.linear(x, at + name).unflatten(2, (n_heads, -1)).transpose(1, 2)
                for name in (names.q, names.k, names.v)
            )
            scale: Any = q.shape[3] ** -0.5
            if names.scale is not None and at + names.scale in self:
                scale = self[at + names.scale]
            context, scores = self.attention(
                q, k, v, scale, keep, before if residual_attention else None
            )
            before, layer = scores, layer + 1
            x = x + self.linear(context, at + names.o)
            x = self.norm(x, at + (names.norm2 if pre_norm else names.norm1))
            x = x + self.linear(ACT[act_fn](self.linear(x, at + names.mlp_in)), at + names.mlp_out)
            x = x if pre_norm else self.norm(x, at + names.norm2)
        return x


def run_model(model: HookedTST, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The hooked model's output, for trials."""
    return model(series, mask=mask)


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


def class_path(source: object) -> str:
    """Module and class of an object: exact, so that subclasses are not taken for their base."""
    return f"{type(source).__module__}.{type(source).__qualname__}"


STACK = "encoder.attn_layers."
EPS = 1e-5  # of every norm and of the scaling, fixed in the source
LAYER = LayerNames(
    q="attention.query_projection",
    k="attention.key_projection",
    v="attention.value_projection",
    o="attention.out_projection",
    norm1="norm1",
    mlp_in="conv1",
    mlp_out="conv2",
    norm2="norm2",
)


def fill_trunk(model: HookedTST, entries: Entries, final: str) -> None:
    """Copy all encoder layers and the norm after them.

    Args:
        model: the hooked model.
        entries: the source's weights.
        final: what the final norm is called.
    """
    for layer, block in enumerate(model.blocks):
        fill_layer(block, entries, f"{STACK}{layer}.", LAYER, model.cfg.n_heads)
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


def tsl_layer_taps(n_layers: int) -> list[Tap]:
    """Where live encoder layers compute our activations; [row, pos, d_model] there too."""

    def swapped(x: Any) -> Tensor:
        return x.transpose(1, 2)

    def first(out: Any) -> Tensor:
        return out[0]

    found = []
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}.", f"{STACK}{layer}"
        found += [
            Tap(f"{ours}hook_attn_out", f"{theirs}.attention", first),
            Tap(f"{ours}mlp.hook_pre", f"{theirs}.conv1", swapped),
            Tap(f"{ours}hook_mlp_out", f"{theirs}.conv2", swapped),
            Tap(f"{ours}hook_normalized_resid_post", theirs, first),
        ]
    return found


def pattern_taps(source: Any, n_layers: int) -> list[Tap]:
    """Patterns, where the source's attention gives them (``output_attention=True``)."""
    paths = [(layer, f"{STACK}{layer}.attention") for layer in range(n_layers)]
    return [
        Tap(f"blocks.{layer}.attn.hook_pattern", path, lambda out: out[1])
        for layer, path in paths
        if getattr(source.get_submodule(path).inner_attention, "output_attention", False)
    ]
