"""What families of Hugging Face transformers share: recognising, rebuilding, unchanged parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import LayerTable, check_keys, second
from tstlens.zoo.registry import class_of, dotted
from tstlens.zoo.t5 import in_full_precision, showing_patterns

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


def live_or_rebuilt(
    source: nn.Module | Mapping[str, Tensor],
    config: Any,
    rebuild: Callable[[Mapping[str, Tensor], Any], nn.Module],
) -> Any:
    """The source: itself where it is live, else made from its weights and its config.

    Args:
        source: a module, or a state dict.
        config: entries of its ``config.json``, or what ``rebuild`` takes for them; needed
            with a state dict, refused without.
        rebuild: from both.
    """
    if not isinstance(source, Mapping):
        if config is not None:
            raise ArgumentError("config: a live model knows it itself; leave it out")
        return source
    if config is None:
        raise ArgumentError(
            "these weights do not tell all of the model's options (head count, context, task); "
            "give config=, the entries of its config.json"
        )
    return rebuild(source, config).eval()


def rebuilder(
    model_class: str, config_class: str, family: str, unused: tuple[str, ...] = ()
) -> Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module]:
    """For :func:`live_or_rebuilt`: ``Model(Config(**entries))`` with the weights of a state dict.

    Args:
        model_class: the class with its module.
        config_class: the class of its config with its module.
        family: which family asks.
        unused: weights that are tied to others, and may be missing.
    """

    def rebuild(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        options = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
        source = class_of(model_class)(class_of(config_class)(**options))
        load_weights(source, state, family, unused)
        return source

    return rebuild


def load_weights(
    source: nn.Module, state: Mapping[str, Tensor], family: str, unused: Iterable[str] = ()
) -> None:
    """Weights of a state dict, all of them and no others, into a source in their precision.

    Args:
        source: made from its config.
        state: the weights.
        family: which family asks.
        unused: names that are tied to others or that nothing reads, so that they may be missing.
    """
    given, expected = (
        {name: weight for name, weight in weights.items() if name not in set(unused)}
        for weights in (state, source.state_dict())
    )
    check_keys(given, expected, family)
    floating = next(weight for weight in given.values() if weight.is_floating_point())
    source.to(dtype=floating.dtype).load_state_dict(given, strict=False)


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


ATTENTION = {f"attn.{letter}": f"self_attn.{letter.lower()}_proj" for letter in "QKVO"}
ATTENTION["attn.q_scale.w"] = "self_attn.scaling"  # TimesFM's, per dimension


def attention_taps(table: LayerTable, model: HookedTST, here: str, there: str) -> list[Tap]:
    """A table's taps at observed positions, with the pattern where a TimesFM shows it (float32)."""
    if model.cfg.dtype == torch.float32:
        pattern = Tap("attn.hook_pattern", "self_attn", second)
        table = replace(table, taps=(*table.taps, pattern))
    return table.find(model, here, there, observed_only=True)


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


def embedding_taps(
    path: str,
    patch_len: int,
    by_series: Callable[[Tensor], Tensor],
    hidden: str = "input_layer",
    mask_is: Literal["missing", "observed"] = "missing",
) -> list[Tap]:
    """Where a residual block that embeds values and their padding computes our activations.

    Args:
        path: of the block.
        patch_len: samples in one patch.
        by_series: [row, ...] as [batch, channel, ...].
        hidden: what the block calls its first linear map.
        mask_is: what is 1 in the second half of what goes in.
    """

    def values(seen: Tensor) -> Tensor:
        return by_series(seen)[..., :patch_len]

    def observed(seen: Tensor) -> Tensor:
        mask = by_series(seen)[..., patch_len:]
        return mask if mask_is == "observed" else 1 - mask

    return [
        Tap("embed.hook_patches", path, values, "input"),
        Tap("embed.hook_observed", path, observed, "input"),
        Tap("embed.block.hook_pre", f"{path}.{hidden}", by_series),
    ]


def last(seen: Tensor) -> Tensor:
    """The last position."""
    return seen[:, -1]
