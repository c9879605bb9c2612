"""What families of Hugging Face transformers share: recognising, rebuilding, unchanged parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import einops
import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SourcePackageError, UnsupportedSourceError
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import check_keys
from tstlens.zoo.t5 import dotted, in_full_precision, showing_patterns

_SHARED = ("torch.nn.", "transformers.activations")


def refuse_changed_parts(source: nn.Module, *packages: str) -> None:
    """Raise :class:`UnsupportedSourceError` where a part of a source is not its package's own.

    Args:
        source: the source.
        packages: modules whose classes it is made of, beside those of torch.
    """
    for path, part in source.named_modules():
        where = f"{path or 'the model'} ({dotted(part)})"
        if not type(part).__module__.startswith((*packages, *_SHARED)):
            raise UnsupportedSourceError(
                f"{where} is not a part of {packages[0]}: it may compute something else, so the "
                "model is not converted"
            )
        if "forward" in vars(part):
            raise UnsupportedSourceError(f"{where} has a forward of its own")


def rebuilt(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    model_class: str,
    config_class: str,
    family: str,
) -> nn.Module:
    """A source with the weights of a state dict.

    Args:
        state: the weights.
        config: entries of its ``config.json``.
        model_class: the class with its module.
        config_class: the class of its config with its module.
        family: which family asks.
    """
    if config is None:
        raise ArgumentError(
            f"the weights of a {family} model do not tell all of its options; give config=, the "
            "entries of its config.json"
        )
    options = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    source = class_of(model_class)(class_of(config_class)(**options))
    check_keys(state, source.state_dict(), family)
    source.to(dtype=next(iter(state.values())).dtype)
    source.load_state_dict(dict(state))
    return source.eval()


def class_of(name: str) -> Any:
    """A class by its module and name.

    Raises:
        SourcePackageError: its package is not there, or an older version.
    """
    module, leaf = name.rsplit(".", 1)
    try:
        return getattr(import_module(module), leaf)
    except (ImportError, AttributeError) as error:
        raise SourcePackageError(
            f"weights are compared with a {leaf} rebuilt from them, which needs a version of "
            f"{module.split('.')[0]} that has {name}"
        ) from error


@contextmanager
def as_compared(source: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In float32 the source shows its attention patterns, in float64 it keeps all digits.

    Both at once do not go: attention that gives its pattern takes the softmax in float32.
    """
    if dtype == torch.float64:
        with in_full_precision(source, dtype):
            yield
    else:
        with showing_patterns(source):
            yield


def attention_weights(attention: Any, n_heads: int) -> dict[str, Tensor]:
    """Weights of TimesFM's attention: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``scaling``.

    Keys and values that several heads share are repeated for each of them.

    Args:
        attention: the source's module.
        n_heads: heads of the queries.
    """
    weights = {"attn.q_scale.w": attention.scaling}
    for letter in "QKV":
        linear = getattr(attention, f"{letter.lower()}_proj")
        d_head = attention.q_proj.out_features // n_heads
        weight = einops.rearrange(linear.weight, "(head d) m -> head m d", d=d_head)
        bias = None if linear.bias is None else linear.bias.unflatten(0, (-1, d_head))
        repeats = n_heads // len(weight)
        weights[f"attn.W_{letter}"] = weight.repeat_interleave(repeats, 0)
        if bias is not None:
            weights[f"attn.b_{letter}"] = bias.repeat_interleave(repeats, 0)
    out = attention.o_proj
    weights["attn.W_O"] = einops.rearrange(out.weight, "m (head d) -> head d m", head=n_heads)
    if out.bias is not None:
        weights["attn.b_O"] = out.bias
    return weights


def block_weights(block: Any, name: str = "block") -> dict[str, Tensor]:
    """Weights of a :class:`~tstlens.zoo.parts.ResidualMLP` named ``name``."""
    first_layer = "input_layer" if hasattr(block, "input_layer") else "hidden_layer"
    names = {"in": first_layer, "out": "output_layer", "skip": "residual_layer"}
    weights = {}
    for ours, theirs in names.items():
        linear = getattr(block, theirs)
        weights[f"{name}.W_{ours}"] = linear.weight.T
        if linear.bias is not None:
            weights[f"{name}.b_{ours}"] = linear.bias
    return weights


def embedding_taps(path: str, patch_len: int, by_series: Callable[[Tensor], Tensor]) -> list[Tap]:
    """Where a residual block that embeds values and their padding computes our activations.

    Args:
        path: of the block.
        patch_len: samples in one patch.
        by_series: [row, ...] as [batch, channel, ...].
    """

    def values(seen: Tensor) -> Tensor:
        return by_series(seen)[..., :patch_len]

    def observed(seen: Tensor) -> Tensor:
        return 1 - by_series(seen)[..., patch_len:]

    return [
        Tap("embed.hook_patches", path, values, "input"),
        Tap("embed.hook_observed", path, observed, "input"),
        Tap("embed.block.hook_pre", f"{path}.input_layer", by_series),
    ]


def attention_taps(here: str, there: str, attention: Any, patterns: bool) -> list[Tap]:
    """Where a layer with ``self_attn`` computes a block's input and its attention.

    Args:
        here: our block.
        there: the source's layer.
        attention: its ``self_attn``.
        patterns: whether it shows its patterns.
    """
    d_head = attention.head_dim
    repeats = attention.q_proj.out_features // attention.k_proj.out_features

    def per_head(seen: Tensor) -> Tensor:
        return seen.unflatten(-1, (-1, d_head))

    def shared(seen: Tensor) -> Tensor:
        return per_head(seen).repeat_interleave(repeats, 2)

    path = f"{there}.self_attn"
    found = [
        Tap(f"{here}.hook_resid_pre", there, of="input", observed_only=True),
        Tap(f"{here}.attn.hook_q", f"{path}.q_proj", per_head, observed_only=True),
        Tap(f"{here}.attn.hook_k", f"{path}.k_proj", shared, observed_only=True),
        Tap(f"{here}.attn.hook_v", f"{path}.v_proj", shared, observed_only=True),
        Tap(f"{here}.attn.hook_z", f"{path}.o_proj", per_head, "input", observed_only=True),
    ]
    if patterns:
        found.append(Tap(f"{here}.attn.hook_pattern", path, second, observed_only=True))
    return found


def first(seen: Any) -> Tensor:
    """The first of what a module gave."""
    return seen[0]


def second(seen: Any) -> Tensor:
    """The second of what a module gave."""
    return seen[1]


def last(seen: Tensor) -> Tensor:
    """The last position."""
    return seen[:, -1]
