"""Writing a file so that an interrupt leaves the old one or the new one, never half."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tstlens.errors import StorageError


def write_text(path: Path, text: str) -> Path:
    """Write text to a file in UTF-8, atomically: see :func:`write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def check_place(path: Path) -> None:
    """Raise before long work what :func:`write_bytes` would raise after it.

    Raises:
        StorageError: the place is a folder, or the folder that it lies in cannot be made.
    """
    if path.is_dir():
        raise StorageError(f"expected a file to write at {path}, found a folder; name a file in it")
    folder = next(above for above in path.absolute().parents if above.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(
            f"{path} cannot be written: {folder} is no folder that can be written to"
        )


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, atomically.

    Args:
        path: the file; its folder is made if missing.
        content: what it is to hold.

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
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if part is not None and os.path.exists(part):
            os.unlink(part)
    return path
