"""Writing a file so that an interrupt leaves the old one or the new one, never half."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tstlens.errors import StorageError


def write_text(path: Path, text: str) -> Path:
    """Write text to a file, atomically.

    Args:
        path: the file; its folder is made if missing.
        text: its content.

    Returns:
        The path.

    Raises:
        StorageError: the place is a folder, or cannot be written.
    """
    if path.is_dir():
        raise StorageError(f"expected a file to write at {path}, found a folder; name a file in it")
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if part is not None and os.path.exists(part):
            os.unlink(part)
    return path
