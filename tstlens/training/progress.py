"""What a training run keeps on disk, so that an interrupted run can go on.

One file, replaced atomically: a run that dies while writing leaves the previous one whole.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tstlens.errors import ArgumentError, CorruptFileError, StorageError

FILE_NAME = "progress.pt"

# What torch.load and json raise for a file that is truncated, altered or of another kind.
_UNREADABLE = (
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def save_progress(folder: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the settings and state of a run, or leave what was there untouched."""
    part = folder / f"{FILE_NAME}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"settings": json.dumps(settings), "state": dict(state)}, part)
        os.replace(part, folder / FILE_NAME)
    except OSError as error:
        raise StorageError(
            f"checkpoint: {folder} cannot be written: {error.strerror or error}; name a folder"
        ) from error
    finally:
        if folder.is_dir():
            part.unlink(missing_ok=True)


def load_progress(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the run kept in a folder; None where there is none.

    Raises:
        ArgumentError: the folder holds a run with other settings; the message names them.
        CorruptFileError: the file is not whole.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        kept = torch.load(path, weights_only=True, map_location="cpu")
        then, state = json.loads(kept["settings"]), kept["state"]
    except _UNREADABLE as error:
        raise CorruptFileError(
            f"expected the progress of a training run in {path}, but the file is not whole; "
            "delete it to start anew"
        ) from error
    now = json.loads(json.dumps(settings))
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        pairs = (f"{name}: {then.get(name)} then, {now.get(name)} now" for name in different)
        listed = "; ".join(pairs)
        raise ArgumentError(
            f"checkpoint: {path} holds a run with other settings ({listed}); "
            "use the same ones to go on, or another folder to start anew"
        )
    return state
