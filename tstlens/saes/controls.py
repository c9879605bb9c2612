"""Dictionaries to stand beside a trained one: random directions, and the neurons themselves.

A sparse code of enough latents reconstructs a lot whatever its directions are, so a trained
dictionary's numbers mean little alone. These controls have as many active latents as it has.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.randomness import seeded
from tstlens.saes.checks import check_at_least

Activations = Float[Tensor, "row width"]


def random_directions(n: int, width: int, seed: int) -> Float[Tensor, "row width"]:
    """Unit vectors uniform on the sphere.

    The seed is moved away from the small numbers that users seed everything with: the same draws
    as a planted dictionary's would be no control at all.
    """
    generator = torch.Generator().manual_seed(seed + 7_777_777)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)


@checked
@seeded(0)
def random_dictionary(
    sae: SAE[Any],
    activations: Activations,
    k: int,
    *,
    seed: int = 0,
    encoder: str = "topk",
) -> SAE[Any]:
    """A dictionary of the same size whose directions are random, centred and scaled on the data.

    Args:
        sae: the dictionary to stand beside; its size, place and metadata are taken.
        activations: [row, width], for the mean and the scale.
        k: active latents.
        seed: of the directions.
        encoder: ``"topk"`` reads along the directions, as a trained SAE does; ``"pursuit"`` picks
            the latents one by one against what is left, the better code for given directions.

    Returns:
        An ``sae_lens.SAE``; decoder rows are uniform on the sphere.
    """
    d_in, d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
    check_at_least(1, k=k)
    if activations.ndim != 2 or activations.shape[1] != d_in or not len(activations):
        raise ArgumentError(
            f"expected activations [row, width={d_in}], got {list(activations.shape)}"
        )
    directions = random_directions(d_sae, d_in, seed).to(activations)
    if encoder == "pursuit":
        cfg: Any = MatchingPursuitSAEConfig(
            **_shared(sae, d_in, d_sae),
            residual_threshold=0.0,
            max_iterations=k,
            stop_on_duplicate_support=False,
        )
        made: SAE[Any] = MatchingPursuitSAE(cfg)
        with torch.no_grad():
            made.W_dec.copy_(directions)
            made.b_dec.copy_(activations.mean(0))
        return made.eval()
    if encoder != "topk":
        raise ArgumentError(f"encoder must be 'topk' or 'pursuit', got {encoder!r}")
    return _topk(sae, directions, activations, k)


@checked
def neuron_dictionary(sae: SAE[Any], activations: Activations, k: int) -> SAE[Any]:
    """The neurons as a dictionary: the k entries that are furthest from their mean, both signs.

    Args:
        sae: the dictionary to stand beside.
        activations: [row, width], for the mean.
        k: entries that are kept.

    Returns:
        An ``sae_lens.SAE`` with 2 * d_in latents: every neuron up, then every neuron down.
    """
    eye = torch.eye(int(sae.cfg.d_in)).to(activations)
    return _topk(sae, torch.cat([eye, -eye]), activations, k)


@torch.no_grad()
@seeded(0)
def _topk(sae: SAE[Any], directions: Tensor, activations: Activations, k: int) -> SAE[Any]:
    d_sae, d_in = directions.shape
    cfg = TopKSAEConfig(**_shared(sae, d_in, d_sae), k=min(k, d_sae))
    made = TopKSAE(cfg)
    made.W_dec.copy_(directions)
    made.W_enc.copy_(directions.T)
    made.b_enc.zero_()
    made.b_dec.copy_(activations.mean(0))
    # Overlapping directions overshoot: the one number that scales the decoder best, by least
    # squares, is given to the control.
    as_rows = activations if not made.hook_z_reshaping_mode else activations.unsqueeze(1)
    parts = made.encode(as_rows).reshape(-1, d_sae) @ made.W_dec
    centred = activations - made.b_dec
    size = parts.pow(2).sum()
    made.W_dec.mul_((parts * centred).sum() / size if size > 0 else 1.0)
    return made.eval()


def _shared(sae: SAE[Any], d_in: int, d_sae: int) -> dict[str, Any]:
    metadata = sae.cfg.metadata
    place = {
        name: metadata[name]
        for name in ("model_name", "hook_name", "hook_name_out", "hook_head_index")
        if metadata[name] is not None
    }
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": sae.cfg.dtype,
        "device": str(sae.W_dec.device),
        "reshape_activations": sae.cfg.reshape_activations,
        "metadata": SAEMetadata(**place),
    }
