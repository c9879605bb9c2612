"""Whether a dictionary found features that were planted: sae-lens' ground-truth measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.synthetic import (
    compute_classification_metrics,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from torch import Tensor

from tstlens.arguments import Seed, checked
from tstlens.errors import ArgumentError
from tstlens.results import TableResult
from tstlens.saes.scoring import random_directions


@dataclass(frozen=True)
class Recovery(TableResult):
    """How well a dictionary matches planted features; a random one of its size beside it.

    Args:
        mcc: mean absolute cosine of decoder rows and features, matched one to one (0 to 1).
        random_mcc: the same for random directions: the floor, which is not 0.
        uniqueness: share of latents that track a feature of their own (0 to 1).
        f1: mean F1 of latents as detectors of the feature they are closest to; NaN without
            activations.
        n_latents: size of the dictionary.
        n_features: planted features.
    """

    mcc: float
    random_mcc: float
    uniqueness: float
    f1: float
    n_latents: int
    n_features: int

    def _rows(self) -> list[dict[str, Any]]:
        return [vars(self)]


@checked
@torch.no_grad()
def recovery(
    sae: SAE[Any],
    features: Float[Tensor, "feature width"],
    activations: Float[Tensor, "row width"] | None = None,
    feature_activations: Float[Tensor, "row feature"] | None = None,
    *,
    seed: Seed = 0,
) -> Recovery:
    """Match a dictionary's decoder with planted feature directions.

    Args:
        sae: the dictionary.
        features: true directions [feature, width].
        activations: rows that the features add up to, for F1.
        feature_activations: how active each feature is in them, for F1.
        seed: of the random directions beside it.

    Returns:
        A Recovery. The mean correlation coefficient of random directions is well above zero when
        there are many of them, hence ``random_mcc``.

    Raises:
        ArgumentError: widths that differ, or only one of the two kinds of activations.

    Source: sae_lens.synthetic; the coefficient is from arXiv 2505.20254.

    Example:
        >>> import torch
        >>> from tstlens import truth
        >>> features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        >>> rows = torch.rand(64, 8).mul(torch.rand(64, 8) < 0.2) @ features
        >>> sae = saes.fit(rows, "topk", d_sae=8, k=2, steps=10, batch_size=32, progress=False)
        >>> truth.recovery(sae, features).n_latents
        8
    """
    if features.ndim != 2 or features.shape[1] != sae.W_dec.shape[1]:
        raise ArgumentError(
            f"expected features [feature, width={sae.W_dec.shape[1]}], got {list(features.shape)}"
        )
    if (activations is None) != (feature_activations is None):
        raise ArgumentError("F1 needs both activations= and feature_activations=, or neither")
    if activations is not None and feature_activations is not None:
        wanted = [len(activations), len(features)]
        if activations.shape[1:] != (sae.cfg.d_in,) or list(feature_activations.shape) != wanted:
            raise ArgumentError(
                f"expected activations [row, width={sae.cfg.d_in}] and feature_activations "
                f"[row={wanted[0]}, feature={wanted[1]}], got {list(activations.shape)} and "
                f"{list(feature_activations.shape)}"
            )
    decoder = sae.W_dec.detach()
    control = random_directions(len(decoder), decoder.shape[1], seed).to(decoder)
    f1 = float("nan")
    if activations is not None and feature_activations is not None:
        latents = sae.encode(activations)
        f1 = compute_classification_metrics(
            latents, feature_activations, decoder, features
        ).f1_score
    return Recovery(
        mcc=mean_correlation_coefficient(decoder, features),
        random_mcc=mean_correlation_coefficient(control, features),
        uniqueness=feature_uniqueness(decoder, features),
        f1=f1,
        n_latents=len(decoder),
        n_features=len(features),
    )
