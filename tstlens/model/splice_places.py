"""Which hook points a dictionary can stand at, and how wide it has to be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tstlens.errors import ArgumentError, HookError

_NO_FEATURE_AXIS = {  # last part of a hook name -> its axes
    "hook_pattern": "[row, head, query, key]",
    "hook_attn_scores": "[row, head, query, key]",
    "hook_scale": "[row, pos, 1]",
    "hook_series": "[batch, channel, time]",
    "hook_loc": "[batch, channel, 1]",
    "hook_scaled": "[batch, channel, time]",
    "hook_patch_mask": "[batch, channel, patch]",
    "hook_parameters": "[batch, channel, horizon, parameter]",
}
_PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z")
_D_MLP = ("mlp.hook_pre", "mlp.hook_post")
_D_MODEL = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_normalized_resid_post",
    "hook_attn_out",
    "hook_attn_mlp_sum",
    "hook_mlp_in",
    "hook_mlp_out",
    "hook_normalized",
    "hook_result",
)


def require_features(name: str) -> None:
    """Raise :class:`HookError` unless a hook point's last axis holds features."""
    axes = _NO_FEATURE_AXIS.get(name.rsplit(".", 1)[-1])
    if axes is None and name.startswith("embed.stages."):
        axes = "[batch, channel, time]"
    if axes is not None:
        raise HookError(f"{name} {axes} has no feature axis for a dictionary to read")


def width_at(cfg: Any, name: str) -> tuple[int | None, int | None]:
    """The width of an activation, heads joined, and its heads; None where there are none.

    The width is None where the config does not tell it.
    """
    require_features(name)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _PER_HEAD:
        fewer = getattr(cfg, "n_key_value_heads", None) if leaf in ("hook_k", "hook_v") else None
        n_heads = int(fewer or cfg.n_heads)
        return int(cfg.d_head) * n_heads, n_heads
    if name.endswith(_D_MLP):
        return int(cfg.d_mlp), None
    return (int(cfg.d_model) if leaf in _D_MODEL else None), None


def check_width(cfg: Any, dictionary: Any, name: str, head: int | None, out: bool = False) -> None:
    """Raise :class:`ArgumentError` unless a dictionary's sizes fit a hook point.

    Args:
        cfg: the model's.
        dictionary: the dictionary's config, or None.
        name: the hook point.
        head: the one head that is meant.
        out: what the dictionary writes instead of what it reads.
    """
    total, n_heads = width_at(cfg, name)
    width = getattr(dictionary, "d_in", None)
    width = getattr(dictionary, "d_out", width) if out else width
    if head is not None and n_heads is None and not name.endswith("hook_result"):
        raise ArgumentError(f"head={head} was given, but {name} has no heads")
    if total is None or width is None:
        return
    fitting: Mapping[int, str]
    if n_heads is not None:
        fitting = {total // n_heads: f"d_head={total // n_heads}"}
        if head is None:
            fitting = {**fitting, total: f"all heads={total}"}
    else:
        fitting = {total: f"{'d_mlp' if name.endswith(_D_MLP) else 'd_model'}={total}"}
    if width not in fitting:
        raise ArgumentError(
            f"expected a dictionary of width {' or '.join(fitting.values())} at {name}, got "
            f"{'d_out' if out else 'd_in'}={width}; was it trained on another model or hook point?"
        )
    groups = getattr(dictionary, "n_groups", 1)
    if n_heads is not None and width == total and n_heads > 1 and groups > 1 and groups % n_heads:
        raise ArgumentError(
            f"expected n_groups=1, or a multiple of n_heads={n_heads} so that no group holds parts "
            f"of two heads at {name}, got n_groups={groups}"
        )
