"""Where a dictionary sits in a model: the hook it reads, the hook it writes, its directions."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError, SeriesShapeError
from tstlens.model import HookedTST, TrunkState
from tstlens.saes.checks import check_dictionary

_BY_ROW = ("layer_norm", "constant_norm_rescale")  # normalisations whose scale differs by position


@dataclass(frozen=True)
class Place:
    """The hooks of a dictionary.

    Args:
        reads: hook point whose activation is encoded.
        writes: hook point that the decoder's output stands for; differs for transcoders.
        head: the one head that is encoded where activations have a head axis, or None.
    """

    reads: str
    writes: str
    head: int | None = None

    @property
    def layer(self) -> int | None:
        """The block to start from for an edit; None where the whole model has to run."""
        found = re.match(r"blocks\.(\d+)\.", self.writes)
        return int(found[1]) if found else None

    @property
    def stop(self) -> int | None:
        """The layer that a run may stop before and still give what is read."""
        found = re.match(r"blocks\.(\d+)\.", self.reads)
        if found:
            return int(found[1]) + 1
        whole = ("head", "ln_final", "encoder", "decoder", "hook_encoded", "hook_decoder")
        return None if self.reads.startswith(whole) else 0


def place_of(model: HookedTST, dictionary: Any) -> Place:
    """The hooks of a dictionary, checked against the model.

    Raises:
        ArgumentError: its metadata name no hook.
        UnknownHookError: the model has no such hook point.
        HookError: the hook point cannot fire as the model is set.
    """
    metadata = getattr(getattr(dictionary, "cfg", None), "metadata", None)
    reads = getattr(metadata, "hook_name", None)
    if not reads:
        raise ArgumentError(
            "expected a dictionary that knows its hook point, got cfg.metadata.hook_name=None; "
            'set it: sae.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"'
        )
    writes = getattr(metadata, "hook_name_out", None) or reads
    model.require_live([reads, writes])
    if writes.startswith(("head", "ln_final")):
        raise HookError(f"{writes} comes after the trunk: it has no positions to read latents at")
    head = getattr(metadata, "hook_head_index", None)
    return Place(reads, writes, None if head is None else int(head))


@dataclass(frozen=True)
class Batch:
    """Latents of a batch of series.

    Args:
        latents: [row, pos, latent], zero at padded positions.
        observed: bool [row, pos], False where a position holds padding.
        inputs: what was encoded, [row, pos, ...].
        state: what crosses the trunk.
        rows_per_series: 1, or the channel count of channel-independent models.
    """

    latents: Float[Tensor, "row pos latent"]
    observed: Bool[Tensor, "row pos"]
    inputs: Float[Tensor, "row pos *feature"]
    state: TrunkState
    rows_per_series: int


@torch.no_grad()
def encode(model: HookedTST, dictionary: Any, place: Place, data: TimeSeriesData) -> Batch:
    """Run the model as far as needed and encode what the dictionary reads.

    Raises:
        SeriesShapeError: the activation has no positions, or not the width of the dictionary.
    """
    series, mask = on_device(model, data)
    _, state = model.embed_series(series, mask)
    _, cache = model.run_with_cache(
        series, mask=mask, names_filter=place.reads, stop_at_layer=place.stop
    )
    found = cache[place.reads]
    if found.ndim not in (3, 4):
        raise SeriesShapeError(
            f"expected an activation [row, pos, ...] at {place.reads}, got {list(found.shape)}"
        )
    found = found if place.head is None else found[:, :, place.head]
    width = found[0, 0].numel()
    joined = getattr(dictionary.cfg, "reshape_activations", "none") == "hook_z"
    expected = getattr(dictionary.cfg, "d_in", width)
    if width != expected or (found.ndim == 4 and not joined):
        raise SeriesShapeError(
            f"expected activations of width d_in={expected} at {place.reads}, got "
            f"{list(found.shape[2:])}; was the dictionary trained on another model or hook, or on "
            "single heads (metadata hook_head_index)?"
        )
    weights = next(iter(dictionary.parameters()), found)
    latents = dictionary.encode(found.to(weights)).to(found)
    observed = model.observed_at(place.reads, state)
    if observed is None:
        observed = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
    latents = torch.where(observed[:, :, None], latents, torch.zeros_like(latents))
    return Batch(latents, observed, found, state, len(found) // len(data))


def on_device(model: HookedTST, data: TimeSeriesData) -> tuple[Tensor, Tensor | None]:
    """Series and mask where the model is, in its dtype."""
    series = data.series.to(device=model.cfg.device, dtype=model.cfg.dtype)
    return series, None if data.mask is None else data.mask.to(series.device)


@torch.no_grad()
def directions(dictionary: Any, chunk: int = 1024) -> Float[Tensor, "latent d_in"]:
    """What one unit of every latent adds to the activation: ``decode(e_i) - decode(0)``.

    A normalisation of the input by position is left out; :func:`scale` gives it.
    """
    check_dictionary(dictionary)
    weights: Tensor = dictionary.W_dec
    n_latents = len(weights)
    plain = copy.copy(dictionary)  # shares the weights; only its functions below are replaced
    plain.run_time_activation_norm_fn_out = lambda x: x
    plain.reshape_fn_out = lambda x, d_head: x
    plain.d_head = None  # sae-lens sets it when z is first encoded
    zero = plain.decode(torch.zeros(1, n_latents, dtype=weights.dtype, device=weights.device))
    parts = []
    for start in range(0, n_latents, chunk):
        size = min(chunk, n_latents - start)
        one_hot = torch.zeros(size, n_latents, dtype=weights.dtype, device=weights.device)
        one_hot[torch.arange(size), start + torch.arange(size)] = 1
        parts.append(plain.decode(one_hot) - zero)
    return torch.cat(parts)


@torch.no_grad()
def scale(
    dictionary: Any, inputs: Float[Tensor, "row pos *feature"]
) -> Float[Tensor, "row pos"] | None:
    """By how much a dictionary that normalises its input multiplies its output, or None for 1."""
    kind = getattr(dictionary.cfg, "normalize_activations", "none")
    if kind not in _BY_ROW:
        return None
    flat = inputs.flatten(2)
    if kind == "layer_norm":
        return flat.std(-1)
    return flat.norm(dim=-1) / flat.shape[-1] ** 0.5
