"""Source models on disk and on the hub: weights, or folders found by their ``config.json``."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.conversion import registry
from tstlens.errors import ArgumentError, CorruptFileError, SourcePackageError, StorageError
from tstlens.model.saving import find_checkpoint

CONFIG = "config.json"


def read_source(
    path: str | Path, family: str | None = None
) -> tuple[nn.Module | Mapping[str, Tensor], str | None]:
    """A source model from a path, and its family.

    Args:
        path: a file of weights (``.safetensors``, or what ``torch.load(weights_only=True)`` reads),
            or a folder or hub id with the ``config.json`` and the weights that the source's own
            ``save_pretrained`` wrote.
        family: which family to load as; by default the one that knows the config.

    Returns:
        A state dict and the family as given, or a live module and its family.

    Raises:
        StorageError: nothing is there, or a folder without ``config.json``.
        CorruptFileError: a file that is not what it should be.
        UnknownFamilyError: no family knows this config.
        SourcePackageError: the package that the source comes from is not installed.
    """
    if Path(path).is_file():
        return _read_weights(Path(path)), family
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise StorageError(
            f"expected a file of weights, a folder or a hub id (organisation/model), found nothing "
            f"at {path}"
        )
    folder = Path(path) if Path(path).is_dir() else find_checkpoint(path)
    config = _read_config(folder)
    chosen = registry.family_reading(config, family)
    try:
        return chosen.load(folder), chosen.name  # type: ignore[misc]
    except ImportError as error:
        raise SourcePackageError(
            f"loading a {chosen.name!r} model needs the package that it comes from: {error}; "
            "install it, or convert the live model where it is installed"
        ) from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"{folder} holds no {chosen.name!r} model that its package can load: {error}"
        ) from error


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise StorageError(
            f"expected {CONFIG} and weights in {folder}, found no {CONFIG}; for weights alone give "
            "the file and family="
        )
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise CorruptFileError(f"{path} holds no JSON object")
    if config.get("format") == "tstlens":
        raise ArgumentError(
            f"{folder} holds a converted model already: HookedTST.from_pretrained('{folder}')"
        )
    return config


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(path)
        else:
            weights = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch and safetensors raise a dozen kinds for a file that is none
        # torch's own words end in the advice to load the file unsafely.
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = "it is damaged, or holds more than tensors" if unsafe else str(error) or "it is empty"
        raise CorruptFileError(
            f"{path} holds no weights that can be loaded safely: {why}; save them again with "
            "torch.save(source.state_dict(), path)"
        ) from error
    for wrapped in ("state_dict", "model_state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapped), Mapping):
            weights = weights[wrapped]
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, Tensor) for value in weights.values()
    ):
        raise CorruptFileError(f"{path} holds no state dict: names and tensors were expected")
    return weights
