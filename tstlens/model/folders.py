"""Where models lie: shipped checkpoints, folders on disk, hub repositories. Needs no torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from tstlens import storage
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    DownloadError,
    StorageError,
    UnknownCheckpointError,
)

CONFIG = "config.json"
FORMAT, FORMAT_VERSION = "tstlens", 1
ON_PURPOSE = (
    "fetch or save the model again, or, where the change is meant, record the new sums: "
    "tstlens.model.seal_checkpoint({folder!r})"
)


def checkpoints_folder() -> Path:
    """Where the shipped checkpoints lie: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "checkpoints"
    return installed if installed.is_dir() else package.parent / "checkpoints"


def list_checkpoints() -> list[str]:
    """Names of the checkpoints that ship with tstlens, for ``HookedTST.from_pretrained``."""
    folder = checkpoints_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / CONFIG).is_file())


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a shipped checkpoint, a folder on disk, or a downloaded hub repository."""
    text = str(name)
    if isinstance(name, str) and text in list_checkpoints():
        return checkpoints_folder() / text
    storage.recover(Path(name))
    with suppress(OSError, ValueError):  # a name that is too long, or holds a NUL, is no folder
        if Path(name).is_dir():
            return Path(name)
    is_hub_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/"))
    if not is_hub_id:
        raise UnknownCheckpointError(
            text, list_checkpoints(), "A folder that save_pretrained wrote works too"
        )
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", "*.md"]))
    except Exception as error:
        raise DownloadError(
            f"{hub_id!r} is neither a folder here nor a checkpoint that ships "
            f"({', '.join(list_checkpoints())}), and fetching it from the hub failed: "
            f"{type(error).__name__}; check the name and the network"
        ) from error


def describe_checkpoint(name: str | Path) -> dict[str, Any]:
    """A checkpoint's ``config.json`` without loading its weights."""
    if not isinstance(name, str | Path):
        raise ArgumentError(f"expected name as a string or a path, got {name!r}")
    return read_config(find_checkpoint(name))


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
    storage.recover(folder)
    if not storage.regular(path):
        raise StorageError(
            f"expected {CONFIG} in {folder}, found none; is this a folder that "
            "model.save_pretrained wrote?"
        )
    record = storage.read_json(
        path,
        "the config of a tstlens model",
        "fetch or save the model again",
        format=FORMAT,
        version=FORMAT_VERSION,
    )
    recorded = record.get("config_sha256")
    said = {name: value for name, value in record.items() if name != "config_sha256"}
    found = storage.digest_of_json(said)
    if check and recorded is not None and found != recorded:
        raise CorruptFileError(
            f"{path} was altered: the SHA-256 of what it says is {found[:12]}…, it records "
            f"{str(recorded)[:12]}…; {ON_PURPOSE.format(folder=str(folder))}"
        )
    return record
