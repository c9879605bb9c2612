"""sae-lens' training configurations with defaults that suit small models.

Published dictionaries of time-series models sit at 0.5 to 4 times the width; 16 times and more
mostly dies. So the default is 4 times the width, k = 8 active latents, and input scaled to a norm
of sqrt(width), on which the coefficients below were chosen.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig

from tstlens.arguments import checked
from tstlens.data.validate import check_dtype_name, usable_device
from tstlens.errors import ArgumentError, UnknownNameError

_BY_K = {"topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"}


def architectures() -> list[str]:
    """Names of the architectures that can be trained: sae-lens' own, and transcoders."""
    import tstlens.saes.transcoder  # noqa: F401  (registers the transcoders)

    return sorted(SAE_TRAINING_CLASS_REGISTRY)


@checked
def training_config(
    sae: str | TrainingSAEConfig,
    d_in: int,
    *,
    d_out: int | None = None,
    d_sae: int | None = None,
    k: int | None = None,
    steps: int = 5000,
    normalize: str = "expected_average_only_in",
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
) -> TrainingSAEConfig:
    """A training configuration from an architecture's name, or a given one that is checked.

    Args:
        sae: a name of :func:`architectures`, or a config, which is taken as it is.
        d_in: width of the activations.
        d_out: width of what a transcoder writes; None for SAEs.
        d_sae: latents; 4 * d_in by default.
        k: active latents per activation, for the architectures that fix it; 8 by default.
        steps: training steps, of which the first fifth warms sparsity penalties up.
        normalize: sae-lens' ``normalize_activations``.
        device: where to train.
        dtype: of the weights.
        options: further fields of the architecture's config, such as ``l1_coefficient``.

    Raises:
        UnknownNameError: no such architecture; lists what there is.
        ArgumentError: k or an option that the architecture does not have, or a config of another
            width.
    """
    options = dict(options or {})
    if isinstance(sae, TrainingSAEConfig):
        _check_given(sae, d_in, d_sae, k, options)
        _check_writes(sae.architecture(), type(sae), d_out)
        return dataclasses.replace(sae, metadata=sae.metadata)
    if sae not in architectures():
        raise UnknownNameError(sae, architectures(), "These are the architectures of sae-lens")
    config_class = SAE_TRAINING_CLASS_REGISTRY[sae][1]
    _check_writes(sae, config_class, d_out)
    width = d_sae if d_sae is not None else 4 * d_in
    place = str(usable_device(device))
    check_dtype_name(dtype)
    if k is not None and sae not in _BY_K and not sae.startswith("topk"):
        penalty = "l0_coefficient" if sae == "jumprelu" else "l1_coefficient"
        raise ArgumentError(f"{sae!r} has no k; say how sparse it should be with {penalty}=")
    active = 8 if k is None else k
    if not 1 <= active <= width:
        raise ArgumentError(f"expected k in 1..{width} (d_sae), got {active}")
    fields = {field.name for field in dataclasses.fields(config_class)}
    chosen: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": width,
        "device": place,
        "dtype": dtype,
        "normalize_activations": normalize,
    }
    for name, value in {
        "d_out": d_out,
        "k": active,
        "max_iterations": active if sae == "matching_pursuit" else None,
        "l1_warm_up_steps": steps // 5,
        "l0_warm_up_steps": steps // 5,
        "l0_coefficient": 1.0,
        "matryoshka_widths": sorted({max(1, width // 4), max(1, width // 2), width}),
    }.items():
        if name in fields and value is not None:
            chosen[name] = value
    if sae == "matching_pursuit":
        chosen["decoder_init_norm"] = 1.0
    if normalize == "layer_norm" and "aux_loss_coefficient" in fields:
        raise ArgumentError(
            f"sae-lens cannot revive dead latents of {sae!r} under normalize='layer_norm'; use "
            "'expected_average_only_in' or 'covariance_whitening'"
        )
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ArgumentError(_no_option(sae, unknown[0], fields))
    try:
        return config_class(**{**chosen, **options})
    except ValueError as error:
        raise ArgumentError(f"sae-lens refuses this configuration: {error}") from error


# Arguments of ``train`` that one may look for under another name, as sae-lens or others call them.
_OF_TRAIN = ("d_sae", "k", "steps", "batch_size", "lr", "seed", "normalize", "head", "mask")
_OF_TRAIN += (
    "hook",
    "hook_out",
    "memory_mb",
    "cache",
    "checkpoint",
    "checkpoint_every",
    "progress",
)
_ELSEWHERE = {
    "n_steps": "steps",
    "training_steps": "steps",
    "learning_rate": "lr",
    "n_latents": "d_sae",
    "n_features": "d_sae",
    "train_batch_size_samples": "batch_size",
}


def _no_option(sae: str, name: str, fields: set[str]) -> str:
    """What to say of an option that neither the architecture nor ``train`` has."""
    options = sorted(fields - {"d_in", "d_out", "metadata", "device"})
    known = [*_OF_TRAIN, *options]
    close = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{sae!r} has no option {name!r}{meant} it has {', '.join(options)}"


def _check_writes(name: str, config_class: type, d_out: int | None) -> None:
    """An SAE given a second hook point would be trained on the two side by side."""
    writes = "d_out" in {field.name for field in dataclasses.fields(config_class)}
    if d_out is not None and not writes:
        raise ArgumentError(
            f"{name!r} gives back what it reads, so it takes no hook_out= (or d_out=); "
            "use 'transcoder' or 'skip_transcoder'"
        )


def _check_given(
    cfg: TrainingSAEConfig, d_in: int, d_sae: int | None, k: int | None, options: dict[str, Any]
) -> None:
    if cfg.d_in != d_in:
        raise ArgumentError(f"expected a config with d_in={d_in}, got d_in={cfg.d_in}")
    if d_sae is not None or k is not None or options:
        raise ArgumentError("the config says d_sae, k and the rest itself; leave them out")
