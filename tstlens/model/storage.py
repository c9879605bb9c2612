"""A model's folder on disk: ``model.safetensors`` and ``config.json``, whole or not there at all.

``config.json`` holds the format's version, the model's configuration, SHA-256 sums (so that a
truncated or altered file is noticed, see ``integrity.py``) and whatever the model's ``info`` says
of its data and training. Folders are written beside their place and renamed into it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tstlens.errors import ArgumentError, ConfigVersionError, CorruptFileError, StorageError
from tstlens.model.integrity import CONFIG, WEIGHTS, check_content, digest_of, sealed

FORMAT_VERSION = 1


def write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a model's folder so that an interrupt leaves the old one or the new one, never half.

    Files in an existing folder that are not the model's (a README, say) stay. ``write_more`` is
    called with the folder in the making, to put what else belongs to the model into it.

    Raises:
        StorageError: the place is a file, or cannot be written.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"expected a folder at {folder}, found a file; choose another place")
    if Path.cwd().is_relative_to(folder):
        raise StorageError(
            f"{folder} is or holds the working directory, and a model's folder is replaced as a "
            "whole; choose a folder of its own"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _fill(staging, folder, weights, config)
            if write_more is not None:
                write_more(staging)
                _write_config(staging, config)  # again, with the sums of what came in
            swap_in(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"could not write the model to {folder}: {error}; what was there is as it was"
        ) from error


def _fill(staging: Path, folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Put the old folder's other files and the new model into ``staging``."""
    if folder.exists():
        shutil.copytree(folder, staging, dirs_exist_ok=True)
    # Cloned because safetensors refuses tensors that share memory, as tied weights do.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(own, staging / WEIGHTS, metadata={"format": "pt"})
    _write_config(staging, config)
    shutil.copymode(staging / CONFIG, staging / WEIGHTS)  # safetensors writes for the owner only
    os.chmod(staging, 0o755)


def _write_config(staging: Path, config: dict[str, Any]) -> None:
    record = {"format": "tstlens", "format_version": FORMAT_VERSION, **config}
    try:
        text = json.dumps(sealed(staging, record), indent=2)
    except TypeError as error:
        raise ArgumentError(
            f"the model's info goes into {CONFIG} and must hold JSON values only: {error}"
        ) from error
    (staging / CONFIG).write_text(text + "\n", encoding="utf-8")


def swap_in(staging: Path, folder: Path) -> None:
    """Rename ``staging`` to ``folder``; put the old folder back if that fails."""
    if not folder.exists():
        os.replace(staging, folder)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        os.replace(folder, retired / "old")
        os.replace(staging, folder)
    except BaseException:
        if not folder.exists():
            os.replace(retired / "old", folder)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and ``config.json`` of a model's folder, checked against the recorded sums.

    Raises:
        StorageError: a file is missing.
        CorruptFileError: a file is truncated, altered, or not what it should be.
        ConfigVersionError: a newer tstlens wrote the folder.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise StorageError(f"expected {WEIGHTS} in {folder}, found none; save the model again")
    digest = digest_of(path)
    if digest != config.get("weights_sha256"):
        raise CorruptFileError(
            f"{path} is truncated or was altered: its SHA-256 is {digest[:12]}…, config.json "
            f"records {str(config.get('weights_sha256'))[:12]}…; fetch or save the model again"
        )
    try:
        return load_file(path), config
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is no safetensors file: {error}") from error


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds the ``config.json`` of another library's model."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    marks = {"model_type", "architectures", "transformer_backbone"}
    return isinstance(config, dict) and "format" not in config and bool(marks & set(config))


def read_config(folder: Path, *, check: bool = True) -> dict[str, Any]:
    """``config.json`` of a model's folder.

    Args:
        folder: the folder.
        check: whether it has to say what was recorded.

    Raises:
        StorageError: there is none.
        CorruptFileError: it is no JSON, not a tstlens model's, or was altered.
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
    if check:
        check_content(path, config)
    return config
