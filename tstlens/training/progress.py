"""What a training run keeps on disk, so that an interrupted run can go on.

One file, replaced atomically: a run that dies while writing leaves the previous one whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tstlens import storage
from tstlens.errors import ArgumentError

FILE_NAME = "progress.pt"


def save_progress(
    folder: Path, settings: Mapping[str, Any], made: Mapping[str, str], state: Mapping[str, Any]
) -> None:
    """Write the settings, fingerprint and state of a run, or leave what was there untouched."""
    kept = {"settings": json.dumps(settings), "fingerprint": dict(made), "state": dict(state)}
    storage.write_torch(folder / FILE_NAME, kept)


def load_progress(
    folder: Path, settings: Mapping[str, Any], made: Mapping[str, str]
) -> dict[str, Any] | None:
    """The state of the run kept in a folder; None where there is none.

    Args:
        folder: where.
        settings: of the run that is to go on, as JSON values.
        made: its :func:`tstlens.storage.fingerprint`: of the model it begins with and the data.

    Raises:
        ArgumentError: the folder holds a run with other settings, of another model or of other
            data; the message names them. Or one from before that was recorded.
        CorruptFileError: the file is not whole.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    again = "delete it to start anew"
    kept = storage.read_torch(path, "the progress of a training run: the file is not whole", again)
    with storage.reading(path, "is not the whole progress of a training run", again):
        then, state = dict(json.loads(kept["settings"])), dict(kept["state"])
    now = json.loads(json.dumps(settings))
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        pairs = (f"{name}: {then.get(name)} then, {now.get(name)} now" for name in different)
        listed = "; ".join(pairs)
        raise ArgumentError(
            f"checkpoint: {path} holds a run with other settings ({listed}); "
            "use the same ones to go on, or another folder to start anew"
        )
    storage.check_same_run(path, kept.get("fingerprint"), made)
    return state
