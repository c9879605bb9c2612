"""SHA-256 sums of what makes a model's folder what it is, kept in its ``config.json``.

``weights_sha256`` is of the weights' file, ``config_sha256`` of everything else that
``config.json`` says (whatever its layout), ``files`` of the dictionaries beside the model. README
and scores are not recorded: they change no result. Folders that were written before a sum was kept
go unchecked for it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tstlens.arguments import checked
from tstlens.errors import CorruptFileError, StorageError
from tstlens.files import write_text

CONFIG, WEIGHTS, DICTIONARIES = "config.json", "model.safetensors", "saes"
_OF_DICTIONARIES = ("cfg.json", "sae_weights.safetensors")  # what sae-lens loads
_ON_PURPOSE = (
    "fetch or save the model again, or, where the change is meant, record the new sums: "
    "tstlens.model.seal_checkpoint({folder!r})"
)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def content_digest(record: dict[str, Any]) -> str:
    """SHA-256 of what a ``config.json`` says, apart from this sum itself."""
    plain = json.loads(json.dumps({k: v for k, v in record.items() if k != "config_sha256"}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A model's ``config.json`` with the sums of what the folder holds now."""
    sums = ("weights_sha256", "files", "config_sha256")
    head = {k: v for k, v in record.items() if k in ("format", "format_version")}
    rest = {k: v for k, v in record.items() if k not in head and k not in sums}
    found = sorted(
        path
        for name in _OF_DICTIONARIES
        for path in (folder / DICTIONARIES).glob(f"*/{name}")
        if path.is_file()
    )
    files = {path.relative_to(folder).as_posix(): digest_of(path) for path in found}
    record = {**head, "weights_sha256": digest_of(folder / WEIGHTS), "files": files, **rest}
    return {**record, "config_sha256": content_digest(record)}


def check_content(path: Path, record: dict[str, Any]) -> None:
    """Raise :class:`CorruptFileError` unless a ``config.json`` says what was recorded."""
    recorded = record.get("config_sha256")
    if recorded is None:
        return
    found = content_digest(record)
    if found != recorded:
        raise CorruptFileError(
            f"{path} was altered: the SHA-256 of what it says is {found[:12]}…, it records "
            f"{str(recorded)[:12]}…; {_ON_PURPOSE.format(folder=str(path.parent))}"
        )


def owner_of(folder: Path) -> Path | None:
    """The model's folder that a dictionary's lies in, or None where it lies in none."""
    folder = folder.resolve()
    model = folder.parent.parent
    try:
        record = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(record, dict) and record.get("format") == "tstlens"
    return model if ours and folder.parent.name == DICTIONARIES else None


def check_dictionary(folder: Path) -> None:
    """Raise :class:`CorruptFileError` if a dictionary is not the one that its model was saved with.

    Args:
        folder: of the dictionary; one that lies in no model's folder, or that the model's
            ``config.json`` does not list, goes unchecked.
    """
    model = owner_of(folder)
    if model is None:
        return
    path = model / CONFIG
    record = json.loads(path.read_text(encoding="utf-8"))
    check_content(path, record)
    for name in _OF_DICTIONARIES:
        part = folder.resolve() / name
        recorded = record.get("files", {}).get(part.relative_to(model).as_posix())
        if recorded is None or not part.is_file():
            continue
        found = digest_of(part)
        if found != recorded:
            raise CorruptFileError(
                f"{part} is truncated or was altered: its SHA-256 is {found[:12]}…, {path} records "
                f"{str(recorded)[:12]}…; {_ON_PURPOSE.format(folder=str(model))}"
            )


@checked
def seal_checkpoint(folder: str | Path) -> Path:
    """Record anew what a model's folder holds, after a change that was meant.

    Loading refuses weights, a config or dictionaries whose SHA-256 is not the recorded one. Call
    this after editing ``config.json`` by hand, or after saving an SAE into ``saes/<hook point>``
    over another. It does not say whether the change is right: load the model and measure it.

    Args:
        folder: the model's, as ``model.save_pretrained`` wrote it.

    Returns:
        The folder.

    Raises:
        StorageError: no model is there, or it cannot be written.
        CorruptFileError: ``config.json`` is no JSON, or not a tstlens model's.

    Example:
        >>> import tempfile
        >>> from tstlens.model import HookedTST, seal_checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> _ = HookedTST.from_pretrained("gunpoint").save_pretrained(folder)
        >>> HookedTST.from_pretrained(seal_checkpoint(folder)).cfg.n_layers
        2
    """
    from tstlens.model.storage import read_config

    folder = Path(folder)
    record = read_config(folder, check=False)
    if not (folder / WEIGHTS).is_file():
        raise StorageError(f"expected {WEIGHTS} in {folder}, found none; save the model again")
    write_text(folder / CONFIG, json.dumps(sealed(folder, record), indent=2) + "\n")
    return folder
