"""A model's folder on disk: ``model.safetensors`` and ``config.json``, whole or not there at all.

``config.json`` holds the format's version, the model's configuration, the SHA-256 of the weights
(so that a truncated or altered file is noticed) and whatever the model's ``info`` says of its data
and training. Folders are written beside their place and renamed into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tstlens.errors import ConfigVersionError, CorruptFileError, StorageError

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_folder(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a model's folder so that an interrupt leaves the old one or the new one, never half.

    Files in an existing folder that are not the model's (a README, say) stay.

    Raises:
        StorageError: the place is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"expected a folder at {folder}, found a file; choose another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if folder.exists():
            shutil.copytree(folder, staging, dirs_exist_ok=True)
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(own, staging / WEIGHTS, metadata={"format": "pt"})
        digest = hashlib.sha256((staging / WEIGHTS).read_bytes()).hexdigest()
        record = {
            "format": "tstlens",
            "format_version": FORMAT_VERSION,
            "weights_sha256": digest,
            **config,
        }
        (staging / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.chmod(staging, 0o755)
        _swap_in(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap_in(staging: Path, folder: Path) -> None:
    """Rename ``staging`` to ``folder``; put the old folder back if that fails."""
    if not folder.exists():
        os.replace(staging, folder)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.replace(folder, retired / "old")
    try:
        os.replace(staging, folder)
    except BaseException:
        os.replace(retired / "old", folder)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and ``config.json`` of a model's folder, checked against the recorded SHA-256.

    Raises:
        StorageError: a file is missing.
        CorruptFileError: a file is truncated, altered, or not what it should be.
        ConfigVersionError: a newer tstlens wrote the folder.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise StorageError(f"expected {WEIGHTS} in {folder}, found none; save the model again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != config.get("weights_sha256"):
        raise CorruptFileError(
            f"{path} is truncated or was altered: its SHA-256 is {digest[:12]}…, config.json "
            f"records {str(config.get('weights_sha256'))[:12]}…; fetch or save the model again"
        )
    try:
        return load_file(path), config
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is no safetensors file: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model's folder.

    Raises:
        StorageError: there is none.
        CorruptFileError: it is no JSON, or not a tstlens model's.
        ConfigVersionError: a newer tstlens wrote it.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise StorageError(
            f"expected {CONFIG} in {folder}, found none; is this a folder that "
            "model.save_pretrained wrote?"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "tstlens":
        raise CorruptFileError(f"{path} is not the config of a tstlens model")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ConfigVersionError(
            f"{path} has format version {version!r}, this tstlens reads up to {FORMAT_VERSION}; "
            "update tstlens"
        )
    return config
