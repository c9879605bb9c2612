"""Activations of a data set at any hook point, with what says where they come from.

Probes, clusters and latents of dictionaries are read through here: [series, channel, pos, width]
beside a mask of the positions that hold no padding. The channel axis has one entry unless the model
takes every channel through its trunk by itself; pooled hook points have one position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from transformer_lens.utilities import get_act_name

from tstlens.arguments import Count, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model.hooked_tst import HookedTST
from tstlens.model.hooking import require_one_pass
from tstlens.run import Pass, Runs

Pool = Literal["mean", "max", "last"]


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """What one hook point held over a data set.

    Args:
        values: [series, channel, pos, width]; heads lie side by side in the width. Zero where the
            position is padding.
        observed: [series, channel, pos], False where the position is padding.
        hook: full name of the hook point.
        n_heads: heads that the width is made of; 1 where there is no head axis.
        time_cells: (first, one past last) sample that figures draw every position at; None where
            positions have no known place in time.
        spans: (first, one past last) sample that every position was embedded from, likewise.
    """

    values: Float[np.ndarray, "series channel pos width"]
    observed: Bool[np.ndarray, "series channel pos"]
    hook: str
    n_heads: int = 1
    time_cells: tuple[tuple[int, int], ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None

    @property
    def layer(self) -> int | None:
        """The block that the hook point lies in, or None."""
        return layer_of(self.hook)

    def joined(self) -> Activations:
        """Channels side by side in the width, for one vector per series and position.

        A position counts where every channel observed it.
        """
        n_series, n_channels, n_pos, width = self.values.shape
        values = self.values.transpose(0, 2, 1, 3).reshape(n_series, 1, n_pos, n_channels * width)
        return replace(self, values=values, observed=self.observed.all(1, keepdims=True))

    @checked
    def head(self, index: int) -> Activations:
        """One head's part of the width."""
        if not 0 <= index < self.n_heads:
            raise ArgumentError(f"expected a head in 0..{self.n_heads - 1}, got {index}")
        values = self.values.reshape(*self.values.shape[:3], self.n_heads, -1)[:, :, :, index]
        return replace(self, values=values, n_heads=1)

    @checked
    def pooled(self, how: Pool = "mean") -> Float[np.ndarray, "series channel width"]:
        """One vector per series and channel, from its observed positions.

        Args:
            how: ``"mean"``, ``"max"`` or ``"last"`` (the last observed position).

        Raises:
            ArgumentError: another pooling.
        """
        seen = self.observed[..., None]
        if how == "mean":
            return (self.values * seen).sum(2) / np.maximum(seen.sum(2), 1)
        if how == "max":
            return np.where(seen, self.values, -np.inf).max(2)
        n_pos = self.observed.shape[2]
        last = n_pos - 1 - self.observed[:, :, ::-1].argmax(2)
        return np.take_along_axis(self.values, last[:, :, None, None], 2)[:, :, 0]

    def rows(self) -> tuple[Float[np.ndarray, "row width"], np.ndarray]:
        """One row per observed position, and its (series, channel, pos)."""
        return self.values[self.observed], np.argwhere(self.observed)

    def __repr__(self) -> str:
        sizes = zip(("series", "channel", "pos", "width"), self.values.shape, strict=True)
        shape = ", ".join(f"{name}={size}" for name, size in sizes)
        return f"Activations({self.hook}, {shape})"


def layer_of(hook: str) -> int | None:
    """The block that a hook point lies in, or None."""
    parts = hook.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def hook_names(model: HookedTST, hooks: str | Sequence[str]) -> list[str]:
    """Full hook names from short ones (TransformerLens') and full ones, in the order of the model.

    A short name of something in a block stands for all layers: ``"resid_post"``, ``"z"``,
    ``"mlp_out"``, ``"pattern"`` …; ``"embed"``, ``"pos_embed"`` and ``"pooled"`` stand for one
    hook point each.

    Args:
        model: the model.
        hooks: one or several names.

    Raises:
        UnknownHookError: the model has no such hook point.
        HookError: it cannot fire as the model is set, or has no feature axis.
        ArgumentError: no name, or one that is named twice.

    Example:
        >>> from tstlens import HookedTST
        >>> hook_names(HookedTST.from_pretrained("japanese-vowels"), ["embed", "mlp_out"])[:2]
        ['hook_embed', 'blocks.0.hook_mlp_out']
    """
    names = [hooks] if isinstance(hooks, str) else list(hooks)
    found: list[str] = []
    for name in names:
        found += [name] if name in model.hook_dict else _of_short(model, name)
    if not found or len(set(found)) != len(found):
        raise ArgumentError(f"expected one or more different hook names, got {names}")
    model.require_live(found)
    for name in found:
        model.require_features(name)
    return found


def _of_short(model: HookedTST, name: str) -> list[str]:
    if name == "pooled":
        return ["head.hook_pooled"]
    if "." in name or name.startswith("hook_"):
        return [name]  # require_live says what is wrong with it
    if name in ("embed", "pos_embed"):
        return [f"hook_{name}"]
    every = [
        get_act_name(name, layer).replace(f"blocks.{layer}", model.layer_name(layer))
        for layer in range(model.cfg.n_layers)
    ]
    known = [full for full in every if full in model.hook_dict]
    return known or every[:1] or [name]


@checked
def activations(
    model: HookedTST,
    data: TimeSeriesData,
    hooks: str | Sequence[str],
    *,
    batch_size: Count = 128,
    progress: bool = False,
) -> dict[str, Activations]:
    """Activations of every series at some hook points, padding marked.

    The model runs in eval mode, without gradients and no further than the hooks need; hooks and
    dictionaries that sit on it stay and take part.

    Args:
        model: the model.
        data: series, with their mask where they are padded.
        hooks: full names, or short ones that stand for all layers; see :func:`hook_names`.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Activations by full hook name, float32 (float64 of a float64 model) on the CPU.

    Raises:
        UnknownHookError, HookError: no such hook point, or one that cannot fire.
        ArgumentError: no series, or a trunk that holds mirrored series too.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, TimeSeriesData, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> probing.activations(model, TimeSeriesData(torch.randn(4, 12, 25)), "mlp_out")[
        ...     "blocks.1.hook_mlp_out"]
        Activations(blocks.1.hook_mlp_out, series=4, channel=1, pos=25, width=128)
    """
    names = hook_names(model, hooks)
    require_one_pass(model, "to probe it")
    title: dict[str, Any] = {"progress": progress, "title": "activations"}
    parts: dict[str, list[tuple[np.ndarray, np.ndarray, int]]] = {name: [] for name in names}
    for one in Runs(model, data, hooks=names, batch_size=batch_size, **title).passes():
        for name in names:
            parts[name].append(_four_axes(one, name))
    return {name: _gathered(model, data, name, parts[name]) for name in names}


@checked
def latents(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    *,
    batch_size: Count = 128,
    progress: bool = False,
) -> Activations:
    """The latents of a dictionary over a data set, padding marked.

    The dictionary is spliced in where its metadata say, with its error term, so that the model goes
    on as it is; in eval mode, without gradients, batch after batch. Afterwards the model is as it
    was. Dictionaries that were spliced in before stay and take part.

    Args:
        model: the model that the dictionary was trained on.
        sae: an SAE or transcoder of sae-lens, a codebook, or any module with ``encode``, ``decode``
            and ``cfg.metadata.hook_name``.
        data: series, with their mask where they are padded.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Activations on the CPU, float32 (float64 of a float64 model): ``values`` [series, channel,
        pos, latent], zero where the position is padding, and ``observed`` [series, channel, pos],
        False there. There is one channel unless the model takes every channel through its trunk by
        itself. A dictionary that reads heads one by one has latent ``i`` of head ``h`` at ``h *
        d_sae + i`` (``.head(h)`` gives one head's). ``rows()`` gives the observed positions as
        [row, latent] with their places, ``pooled()`` one vector per series.

    Raises:
        ArgumentError: a dictionary that does not know its hook point, or of another width; no
            series; or a trunk that holds mirrored series too.
        UnknownHookError, HookError: a hook point that the model does not have, or that cannot fire.

    Example:
        >>> from tstlens import HookedTST, load_dataset, saes
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> sae = saes.load("japanese-vowels", "blocks.0.hook_mlp_out")
        >>> found = saes.latents(model, sae, load_dataset("JapaneseVowels", split="test"))
        >>> found.values.shape, int(found.observed.sum())
        ((370, 1, 25, 256), 5687)
    """
    with spliced(model, sae) as point:
        return activations(model, data, point, batch_size=batch_size, progress=progress)[point]


@contextmanager
def spliced(model: HookedTST, sae: Any, use_error_term: bool = True) -> Iterator[str]:
    """A dictionary spliced in for a while; gives the hook point of its latents.

    Args:
        model: the model.
        sae: the dictionary.
        use_error_term: keep what the dictionary misses, so that splicing alone changes nothing.
    """
    with model.saes([sae], use_error_term=use_error_term):
        metadata = sae.cfg.metadata
        place = getattr(metadata, "hook_name_out", None) or metadata.hook_name
        yield f"{place}.hook_sae_acts_post"


def _four_axes(one: Pass, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """[series, channel, pos, width], which positions count, and the heads in the width."""
    found, n_heads = one.acts[name], 1
    if found.ndim == 2:  # pooled
        found = found[:, None]
    if found.ndim == 4:
        n_heads = found.shape[2]
        found = found.flatten(2)
    if found.ndim != 3 or len(found) % len(one):
        raise SeriesShapeError(
            f"expected an activation [row, pos, width] at {name}, got {list(found.shape)}"
        )
    found = found.unflatten(0, (len(one), -1)).cpu()
    values = (found if found.dtype == torch.float64 else found.float()).numpy()
    observed, mask = np.ones(values.shape[:3], dtype=bool), one.observed(name)
    if mask is not None and mask.shape[1] == values.shape[2] and not name.startswith("head"):
        observed[:] = mask.cpu().numpy().reshape(len(one), -1, values.shape[2])
    return values, observed, n_heads


def _gathered(
    model: HookedTST,
    data: TimeSeriesData,
    name: str,
    parts: list[tuple[np.ndarray, np.ndarray, int]],
) -> Activations:
    values, observed = (np.concatenate([part[at] for part in parts]) for at in (0, 1))
    cells, spans = (
        _times(model, kind, values.shape[2], data.n_time) for kind in ("time_cell", "time_span")
    )
    values = np.where(observed[..., None], values, 0)
    return Activations(values, observed, name, parts[0][2], cells, spans)


def _times(
    model: HookedTST, kind: str, n_pos: int, n_time: int
) -> tuple[tuple[int, int], ...] | None:
    if model.n_pos(n_time) != n_pos or model.cfg.positions_are == "channel":
        return None
    found = [getattr(model, kind)(pos, n_time) for pos in range(n_pos)]
    return tuple((part.start, part.stop) for part in found)
