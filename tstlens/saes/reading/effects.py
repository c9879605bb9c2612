"""What removing each latent does to the model's output, measured for all latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.saes.reading.worlds import Worlds


@dataclass(frozen=True, eq=False)
class OutputEffects:
    """Mean change of the output when a latent is taken away.

    Args:
        task: ``"class"`` or ``"forecast"``.
        change: [latent, output] mean over the series used, of the logit of each class, or of the
            forecast at each step (mean over channels, in the units of the output; of quantiles or
            a distribution the median); NaN for latents that are never active.
        probability: [latent, class] the same of the probabilities; None for forecasts.
        size: [latent] root mean square change over series and outputs.
        n_series: [latent] series used: those where the latent is strongest.
    """

    task: str
    change: Float[np.ndarray, "latent output"]
    probability: Float[np.ndarray, "latent output"] | None
    size: Float[np.ndarray, " latent"]
    n_series: Int[np.ndarray, " latent"]


def output_effects(
    model: HookedTST,
    dictionary: Any,
    data: TimeSeriesData,
    *,
    n_series: int = 8,
    batch_size: int = 128,
    progress: bool = False,
) -> OutputEffects:
    """The effect on the output of removing one latent's contribution, for every latent.

    Each active latent's term ``activation * direction`` is subtracted from the activation at all
    positions, in the series where the latent is strongest; the dictionary's error stays in place,
    and everything downstream is computed anew. So this is a measured effect, on pre-norm and
    post-norm models alike; it is not a projection of the decoder on the output weights, which
    would claim that the rest of the model is linear.

    What can mislead: other latents keep the activations of the clean run, and a later layer may
    make up for the loss; the effect is that of removal, where the latent is strong, not on an
    average series.

    Args:
        model: the model.
        dictionary: its SAE or codebook.
        data: series to measure on.
        n_series: series per latent.
        batch_size: worlds per forward pass.
        progress: show a progress bar.

    Raises:
        ArgumentError: n_series below 1.
    """
    if n_series < 1:
        raise ArgumentError(f"expected n_series of at least 1, got {n_series}")
    worlds = Worlds(model, dictionary, data, batch_size=batch_size)
    by_series = worlds.latents.unflatten(0, (-1, worlds.rows)).amax((1, 2))  # [series, latent]
    top = by_series.topk(min(n_series, len(data)), dim=0)
    use = top.values > 0  # [rank, latent]
    latents, ranks = use.T.nonzero(as_tuple=True)  # in order of the latent
    series = top.indices[ranks, latents]
    forecast = worlds.output.ndim == 3
    n_out = worlds.output.shape[-1]
    n_latents = by_series.shape[1]
    change = torch.zeros(n_latents, n_out, dtype=torch.float64)
    probability = torch.zeros(n_latents, n_out, dtype=torch.float64)
    square = torch.zeros(n_latents, dtype=torch.float64)
    steps = range(0, len(series), batch_size)
    for start in tqdm(steps, desc="effects", disable=not progress, leave=False):
        which, latent = series[start : start + batch_size], latents[start : start + batch_size]
        rows = worlds.row_index(which)
        per_row = latent.repeat_interleave(worlds.rows)
        amounts = -worlds.latents[rows].gather(
            2, per_row[:, None, None].expand(-1, worlds.latents.shape[1], 1)
        )
        edited = worlds.outputs(which, amounts[..., 0], latent).double().cpu()
        before = worlds.output[which].double().cpu()
        difference = edited - before
        target = latent.cpu()
        square.index_add_(0, target, difference.flatten(1).square().mean(1))
        if forecast:
            change.index_add_(0, target, difference.mean(1))
        else:
            change.index_add_(0, target, difference)
            probability.index_add_(0, target, edited.softmax(-1) - before.softmax(-1))
    count = use.sum(0).cpu()
    mean = torch.where(count > 0, count, torch.nan)
    return OutputEffects(
        task="forecast" if forecast else "class",
        change=(change / mean[:, None]).numpy(),
        probability=None if forecast else (probability / mean[:, None]).numpy(),
        size=(square / mean).sqrt().numpy(),
        n_series=count.numpy(),
    )
